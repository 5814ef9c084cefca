"""What slots hold stays what their sequences have read, whatever others do: steps that are filled up to a recorded
width, steps ahead of what is known, slots that go on from a prompt or a dialogue, slots that are left.

Graphs are recorded by one that does the work again, without a GPU (see test_graphs.py); the steps are the same.
"""

import itertools
import random
from unittest import mock

import pytest
import torch
from generating import WithoutGpu, make_stage

from megalora.generation import replica, steps
from megalora.generation.cache import Span
from megalora.generation.choosing import Underway
from megalora.generation.graphs import DecodeGraphs
from megalora.generation.replica import Replica
from megalora.generation.requests import Prompt
from megalora.generation.sampling import Sampling
from megalora.generation.steps import Steps
from megalora.parallel.mesh import build_mesh

HYBRIDS = ("qwen3_5_text", "qwen3_next", "lfm2", "bamba", "falcon_h1")


@pytest.fixture(scope="module", params=[*HYBRIDS, "mistral"])
def stage(request):
    made = make_stage(build_mesh(0, 1), request.param)
    made.refresh_adapters()
    return made


@pytest.fixture
def graphs(monkeypatch):
    """Steps are recorded, and filled up."""
    monkeypatch.setattr(steps, "graph_obstacle", lambda stage, fp8: None)
    monkeypatch.setattr(DecodeGraphs, "_recorder", WithoutGpu())


def text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, 90) for _ in range(length)]


@pytest.mark.parametrize("seed", range(5))
@torch.inference_mode()
def test_sequences_that_share_steps_are_as_alone(stage, graphs, seed):
    """Prompts whole and in parts, steps of one token of any of the others, slots left and taken by new sequences."""
    rng = random.Random(seed)
    many = rng.randint(2, 6)
    shared = Steps(stage, many, 32)
    read: dict[int, list[int]] = {}  # what each slot has read
    expected: dict[tuple[int, ...], torch.Tensor] = {}

    def alone(tokens: list[int]) -> torch.Tensor:
        """What the last token gives."""
        if tuple(tokens) not in expected:
            expected[tuple(tokens)] = Steps(stage, 1, 32).prefill(None, tokens, [Span(0, 0, len(tokens))])[-1]
        return expected[tuple(tokens)]

    for _ in range(14):
        for slot in [slot for slot in read if len(read[slot]) > 24 or rng.random() < 0.1]:
            del read[slot]
        if not read or rng.random() < 0.4:
            chosen = rng.sample(range(many), rng.randint(1, many))
            new = {slot: text(rng, rng.randint(1, 6)) for slot in chosen}
            spans = [Span(slot, len(read.get(slot, ())), len(read.get(slot, ())) + len(new[slot])) for slot in chosen]
            out = shared.prefill(None, [token for slot in chosen for token in new[slot]], spans)
            out = out[[end - 1 for end in itertools.accumulate(len(new[slot]) for slot in chosen)]]
        else:
            chosen = rng.sample(sorted(read), rng.randint(1, len(read)))
            new = {slot: text(rng, 1) for slot in chosen}
            ids, places = [new[slot][0] for slot in chosen], [len(read[slot]) for slot in chosen]
            out = shared.decode(None, torch.tensor(ids) if rng.random() < 0.5 else ids, chosen, places)
        for slot, row in zip(chosen, out.clone(), strict=True):
            read[slot] = [*read.get(slot, ()), *new[slot]]
            torch.testing.assert_close(row, alone(read[slot]), rtol=1e-9, atol=1e-9)


class Leaver:
    """Ends the reply to each prompt after so many tokens, where it says so."""

    def __init__(self, leaves: dict[int, int]):
        self.leaves, self.heard = leaves, {}

    def hear(self, prompt, token_id, logprobs):
        self.heard[prompt.number] = self.heard.get(prompt.number, 0) + 1
        return "interrupted" if self.heard[prompt.number] == self.leaves.get(prompt.number) else None

    def left(self, prompt):
        return False

    def done(self, prompt, reply):
        pass


class Dialogues:
    """Some dialogues side by side, and what each would be told alone, by steps that are neither recorded nor ahead."""

    CONTEXT = 120

    def __init__(self, stage, rng: random.Random, **patches):
        mesh = build_mesh(0, 1)
        self.rng, self._stage, self._mesh = rng, stage, mesh
        self.stop = frozenset(range(0, 97, 8))  # often enough that most replies end so
        self.replica = Replica(stage, mesh.pp, mesh.tp, self.CONTEXT, Sampling(), self.stop, listened_to=True)
        self.histories = [text(rng, rng.randint(4, 12)) for _ in range(4)]
        self.went_on = 0

    def alone(self, prompt: list[int], most: int, leaves: int | None) -> tuple[int, ...]:
        one = Replica(self._stage, self._mesh.pp, self._mesh.tp, self.CONTEXT, Sampling(), self.stop)
        with mock.patch.object(Steps, "runs_ahead", False):
            said = one.replies([Prompt(0, tuple(prompt))], most)[0].token_ids
        return said if leaves is None else said[:leaves]

    def turn(self, number: int) -> tuple[list[int], int, int | None]:
        """Return (a prompt that goes on the dialogue, or leaves it, longest reply, when the person leaves)."""
        rng = self.rng
        history = self.histories[number]
        if rng.random() < 0.15 or len(history) > 70:
            history = history[: rng.randint(2, 20)]
        prompt = [*history, *text(rng, rng.randint(1, 3))]
        return prompt, rng.randint(1, 9), rng.randint(1, 4) if rng.random() < 0.3 else None

    def went(self, number: int, prompt: list[int], said: tuple[int, ...]) -> None:
        """Take a reply into the dialogue, as templates do: with a token that ended it, or with another."""
        ends = [self.rng.choice(sorted(self.stop))] if self.rng.random() < 0.7 else []
        self.histories[number] = [*prompt, *said, *ends]

    def round(self) -> None:
        chosen = self.rng.sample(range(len(self.histories)), self.rng.randint(1, len(self.histories)))
        turns = {number: self.turn(number) for number in chosen}
        most = max(turn[1] for turn in turns.values())
        listener = Leaver({number: turn[2] for number, turn in turns.items() if turn[2] is not None})
        asked = [Prompt(number, tuple(turn[0])) for number, turn in turns.items()]
        found = self.replica.replies(asked, most, listener)
        for prompt, reply in zip(asked, found, strict=True):
            wanted = self.alone(list(prompt.token_ids), most, listener.leaves.get(prompt.number))
            assert reply.token_ids == wanted
            self.went(prompt.number, list(prompt.token_ids), wanted)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_dialogues_side_by_side_are_as_alone(stage, graphs, monkeypatch, seed, ahead):
    """Turns that go on from what a slot holds, or do not; replies that end by a token, by length, or are left; more
    prompts than slots."""
    monkeypatch.setattr(replica, "WORTH_KEEPING", 1)
    monkeypatch.setattr(replica, "MAX_RUNNING", 3)
    rng = random.Random(seed)
    spans, prefill = [], Steps.prefill

    def noted(self, hidden, ids, given, *rest):
        spans.extend(given if self is shared.replica._steps else ())
        return prefill(self, hidden, ids, given, *rest)

    monkeypatch.setattr(Steps, "prefill", noted)
    if not ahead:
        monkeypatch.setattr(Steps, "runs_ahead", False)
    shared = Dialogues(stage, rng)
    for _ in range(6):
        shared.round()
    assert any(span.start for span in spans), "some go on from what a slot holds"
    assert not ahead or shared.replica._steps.runs_ahead


def test_a_slot_has_read_the_token_that_ended_its_reply(graphs, monkeypatch):
    """With a step ahead it has, and the next turn goes on behind it; without one it has not, and goes on before it."""
    monkeypatch.setattr(replica, "WORTH_KEEPING", 1)
    stage, mesh, fed, prefill = make_stage(build_mesh(0, 1), "qwen3_5_text"), build_mesh(0, 1), [], Steps.prefill
    first = text(random.Random(3), 9)

    def one_of(stop=()):
        return Replica(stage, mesh.pp, mesh.tp, 64, Sampling(), stop)

    said = one_of().replies([Prompt(0, first)], 6)[0].token_ids
    end = next(i for i in range(1, 6) if said[i] not in said[:i])
    more = [*first, *said[: end + 1], 5, 7]
    wanted = one_of(said[end : end + 1]).replies([Prompt(0, more)], 6)

    def counted(self, hidden, ids, *rest):
        fed.append(len(ids))
        return prefill(self, hidden, ids, *rest)

    monkeypatch.setattr(Steps, "prefill", counted)
    for ahead, new in ((True, 2), (False, 3)):
        fed.clear()
        with mock.patch.object(Steps, "runs_ahead", ahead):
            one = one_of(said[end : end + 1])
            assert one.replies([Prompt(0, first)], 6)[0].token_ids == said[:end]
            assert one.replies([Prompt(1, more)], 6)[0].token_ids == wanted[0].token_ids
        assert fed == [9, new]


@pytest.mark.parametrize("family", ["qwen3_5_text", "mistral"])
def test_nobody_goes_on_from_what_an_error_ended(family, graphs, monkeypatch):
    """A slot has read less than is noted where its prompt was in parts, and more where a step was ahead."""
    monkeypatch.setattr(replica, "WORTH_KEEPING", 1)
    monkeypatch.setattr(replica, "STEP_TOKENS", 5)
    stage, mesh = make_stage(build_mesh(0, 1), family), build_mesh(0, 1)
    first = text(random.Random(3), 9)

    def one_of():
        return Replica(stage, mesh.pp, mesh.tp, 64, Sampling(), ())

    said = one_of().replies([Prompt(0, first)], 6)[0].token_ids
    for of, name, calls in ((Steps, "prefill", 1), (Underway, "tokens", 2)):
        works, left = getattr(of, name), [calls]

        def breaks(self, *given, works=works, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return works(self, *given)

        for read in range(4):
            one, left[0] = one_of(), calls
            with mock.patch.object(of, name, breaks), pytest.raises(KeyboardInterrupt):
                one.replies([Prompt(0, first)], 6)
            more = [*first, *said[:read], 5]
            assert one.replies([Prompt(1, more)], 6) == one_of().replies([Prompt(1, more)], 6)
