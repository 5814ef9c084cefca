"""Long prompts in parts: the numbers of whole ones, on every layout, while others go on."""

import itertools
from unittest import mock

import pytest
import torch
from generating import make_stage
from oracle import fields_of
from spawn import spawn

from megalora.errors import UserError
from megalora.generation import replica
from megalora.generation.cache import KVCache, Span
from megalora.generation.replica import Replica
from megalora.generation.requests import Prompt, Request
from megalora.generation.sampling import Sampling
from megalora.generation.steps import Steps
from megalora.parallel.mesh import build_mesh
from megalora.pictures import Picture

FAMILIES = ("mistral", "gemma2", "gpt_oss", "deepseek_v2", "bloom", "gpt2", "phi3, longrope", "llama4_text")
FAMILIES += ("qwen3_5_text",)
LENGTHS, NEW, WHOLE, PART = (30, 3, 45), 5, 8192, 7


def prompts(lengths=LENGTHS) -> list[Prompt]:
    generator = torch.Generator().manual_seed(4)
    return [Prompt(i, torch.randint(1, 90, (n,), generator=generator).tolist()) for i, n in enumerate(lengths)]


def replies(rank: int, world_size: int, tp: int, family: str, step_tokens: int, fp8: bool = False):
    """(the replies, the logits of each prompt on the rank that keeps them, tokens of each prefill)"""
    mesh = build_mesh(rank, world_size, tp, world_size // tp)
    logits, fed = {}, []
    prefill = Steps.prefill

    def counted(self, hidden, ids, spans, *rest):
        fed.append(len(ids))
        return prefill(self, hidden, ids, spans, *rest)

    with mock.patch.object(replica, "STEP_TOKENS", step_tokens), mock.patch.object(Steps, "prefill", counted):
        one = Replica(
            make_stage(mesh, family), mesh.pp, mesh.tp, 96, Sampling(), (), fp8_cache=fp8,
            keep_logits=lambda prompt, x: logits.update({prompt.number: x.clone()}),
        )  # fmt: skip
        said = [reply.token_ids for reply in one.replies(prompts(), NEW)]
    return said, logits, fed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_parts_has_the_numbers_of_the_whole(family):
    """Windows, chunks, softcap, sinks, latents, ALiBi, learned positions, frequencies by the length of the prompt,
    states."""
    said, logits, fed = replies(0, 1, 1, family, WHOLE)
    assert fed == [sum(LENGTHS)]
    again, in_parts, fed = replies(0, 1, 1, family, PART)
    assert max(fed) <= PART and sum(fed) == sum(LENGTHS)
    assert again == said and in_parts.keys() == logits.keys()
    for number, whole in logits.items():
        torch.testing.assert_close(in_parts[number], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["mistral", "deepseek_v2", "qwen3_5_text", "falcon_h1, a norm", "lfm2"])
def test_parts_over_tensor_and_pipeline_ranks(family):
    said, logits, _ = replies(0, 1, 1, family, WHOLE)
    found = spawn(replies, 4, 2, family, PART)
    assert all(one[0] == said and max(one[2]) <= PART for one in found)
    for number, whole in logits.items():
        torch.testing.assert_close(found[2][1][number], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["mistral", "deepseek_v2", "gemma2", "gpt_oss", "bloom", "llama4_text"])
def test_a_cache_in_8_bits(family):
    """Near the numbers of the compute dtype, and the same in parts and over ranks: scales are of a head and a token."""
    _, exact, _ = replies(0, 1, 1, family, WHOLE)
    said, logits, _ = replies(0, 1, 1, family, WHOLE, True)
    again, in_parts, _ = replies(0, 1, 1, family, PART, True)
    assert again == said
    over = spawn(replies, 4, 2, family, PART, True)[2] if family in ("mistral", "deepseek_v2") else (said, logits)
    assert over[0] == said
    for number, whole in logits.items():
        torch.testing.assert_close(in_parts[number], whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(over[1][number], whole, rtol=1e-12, atol=1e-12)
        off = (whole - exact[number]).norm() / exact[number].norm()
        assert 1e-5 < off < 0.1, off


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_moe"])
def test_the_bytes_of_a_cache_are_told_before_it_is_there(family, fp8):
    stage = make_stage(build_mesh(0, 1), family)
    stage.refresh_adapters()
    steps = Steps(stage, 3, 40, fp8=fp8)
    told = steps.cache_bytes
    with torch.inference_mode():
        steps.prefill(None, [1, 2], [Span(1, 0, 2)])
    assert steps._cache.nbytes == told > 0


def test_8_bits_take_half_of_16():
    x = torch.zeros(1, 8, 128, dtype=torch.bfloat16)
    sizes = []
    for fp8 in (False, True):
        cache = KVCache(2, 64, fp8=fp8)
        cache.layer(0, x, x.clone())
        sizes.append(cache.nbytes)
    assert sizes == [2 * 2 * 8 * 64 * 256, 2 * 2 * 8 * 64 * (128 + 4)]


def test_a_cache_that_a_gpu_has_no_room_for_is_refused(monkeypatch):
    mesh = build_mesh(0, 1)
    one = Replica(make_stage(mesh, "mistral"), mesh.pp, mesh.tp, 96, Sampling(), ())
    held = one.reserve(4, 64)
    assert held == one._steps.cache_bytes > 0
    monkeypatch.setattr(replica, "_free_memory", lambda device: held)
    one.reserve(4, 64)
    monkeypatch.setattr(replica, "_free_memory", lambda device: held - 1)
    with pytest.raises(UserError, match="keys and values of 4 requests of 64 tokens need .* GiB on a GPU") as refused:
        one.reserve(4, 64)
    assert "--kv_cache fp8" in refused.value.hint


class Inbox:
    """Requests that are there at once; the first is asked for alone."""

    def __init__(self, requests):
        self.left = list(requests)

    def wait(self, seconds):
        return self.take(1) or None

    def take(self, count):
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def waiting(self):
        return bool(self.left)

    def changing(self):
        return False

    def change(self):
        return None


class Diary:
    """What happens, in order: the tokens of each prompt's part, the sequences of a decoding step, who is done."""

    def __init__(self, leaves=None):
        self.lines, self.replies, self._leaves = [], {}, leaves

    def hear(self, prompt, token_id, logprobs):
        return None

    def left(self, prompt):
        """Who `leaves` does so after two parts of its prompt."""
        return prompt.number == self._leaves and self.lines.count(("fed", PART)) >= 2

    def done(self, prompt, reply):
        self.lines.append(("done", prompt.number))
        self.replies[prompt.number] = reply.token_ids


def write_down(diary, monkeypatch):
    """Have the diary written from now on."""
    monkeypatch.setattr(replica, "STEP_TOKENS", PART)
    prefill, decode = Steps.prefill, Steps.decode

    def fed(self, hidden, ids, spans, *rest):
        diary.lines.append(("fed", len(ids)))
        return prefill(self, hidden, ids, spans, *rest)

    def decoded(self, hidden, ids, *rest):
        diary.lines.append(("decoded", len(ids)))
        return decode(self, hidden, ids, *rest)

    monkeypatch.setattr(Steps, "prefill", fed)
    monkeypatch.setattr(Steps, "decode", decoded)


def test_who_leaves_is_noticed_between_the_parts_of_its_prompt(monkeypatch):
    diary = Diary(leaves=0)
    write_down(diary, monkeypatch)
    mesh = build_mesh(0, 1)
    stage, (long, other) = make_stage(mesh, "mistral"), prompts((70, 5))
    again = Prompt(2, long.token_ids)  # finds a part of itself in the slot, and must not take it for the whole
    one = Replica(stage, mesh.pp, mesh.tp, 128, Sampling(), (), listened_to=True)
    one.reserve(1, 128)
    one.serve(Inbox([Request(p, Sampling(), NEW, frozenset()) for p in (long, again, other)]), diary, mesh.world)
    assert diary.lines[:3] == [("fed", PART), ("fed", PART), ("done", 0)]
    assert diary.replies[0] == ()
    alone = Replica(stage, mesh.pp, mesh.tp, 128, Sampling(), ())
    for prompt in (again, other):
        assert diary.replies[prompt.number] == alone.replies([prompt], NEW)[0].token_ids


def test_others_go_on_and_enter_between_the_parts_of_a_long_prompt(monkeypatch):
    mesh, diary = build_mesh(0, 1), Diary()
    write_down(diary, monkeypatch)
    stage, asked = make_stage(mesh, "mistral"), prompts((4, 70, 5, 6))
    one = Replica(stage, mesh.pp, mesh.tp, 128, Sampling(), (), listened_to=True)
    one.reserve(4, 128)
    one.serve(Inbox([Request(p, Sampling(), NEW + p.number, frozenset()) for p in asked]), diary, mesh.world)
    assert diary.lines[0] == ("fed", 4), "the first"
    parts = [i for i, line in enumerate(diary.lines) if line == ("fed", PART)]
    assert len(parts) == 70 // PART, diary.lines
    for i, j in itertools.pairwise(parts):
        over = {("done", 0), ("done", 2), ("done", 3)} <= {*diary.lines[:j]}  # nobody else is there
        assert over or any(kind == "decoded" for kind, _ in diary.lines[i + 1 : j]), diary.lines
    last = parts[-1]
    assert {("done", 0), ("done", 2)} <= {*diary.lines[:last]}, diary.lines
    assert {("fed", 4), ("fed", 5), ("fed", 6)} <= {*diary.lines[:last]}, "nobody waits for all of the long one"
    alone = Replica(stage, mesh.pp, mesh.tp, 128, Sampling(), ())
    for prompt in asked:
        assert diary.replies[prompt.number] == alone.replies([prompt], NEW + prompt.number)[0].token_ids


# ---- steps that are launched before the tokens of the one before are known (megalora.generation.choosing.Underway)
#
# On a CPU each runs at once, but the same code decides what it feeds and what is taken from it.

MANY, LONG = (9, 3, 14, 6, 11), 8
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=1.5, top_p=0.95, seed=3),
    "penalised": Sampling(temperature=0.9, repetition_penalty=1.7, seed=1),
}


class Stopper:
    """Ends the replies of `stops` after so many tokens; hears all of them."""

    def __init__(self, stops):
        self.stops, self.heard, self.replies = stops, {}, {}

    def hear(self, prompt, token_id, logprobs):
        heard = self.heard.setdefault(prompt.number, [])
        heard.append((token_id, logprobs is not None))
        return "stop" if len(heard) == self.stops.get(prompt.number) else None

    def left(self, prompt):
        return False

    def done(self, prompt, reply):
        self.replies[prompt.number] = reply


def ahead(on: bool):
    return mock.patch.object(Steps, "runs_ahead", on)


@pytest.fixture(scope="module")
def stage():
    return make_stage(build_mesh(0, 1), "mistral")


def one_of(stage, sampling=None, stop=(), **more):
    mesh = build_mesh(0, 1)
    return Replica(stage, mesh.pp, mesh.tp, 64, sampling or Sampling(), stop, **more)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_replies_are_the_same(stage, name):
    """With tokens that end some of them, one after another, and prompts that enter where others have ended."""
    asked = prompts(MANY)
    with ahead(False):
        free = [reply.token_ids for reply in one_of(stage, SAMPLINGS[name]).replies(asked, LONG)]
    stop = {free[0][2], free[3][5]}
    found = []
    for on in (False, True):
        with ahead(on), mock.patch("megalora.generation.replica.MAX_RUNNING", 3):
            one = one_of(stage, SAMPLINGS[name], stop)
            found.append([one.replies(asked, LONG), one.replies(asked[:2], LONG + 1)])
    assert found[0] == found[1]
    assert {reply.finish_reason for reply in found[0][0]} == {"stop", "length"}


@pytest.mark.parametrize("on", [False, True])
def test_a_step_ahead_feeds_the_token_that_was_chosen(stage, on):
    """Every step but the first has its tokens from the one before, and the last is not run twice."""
    fed, decode = [], Steps.decode

    def decoded(self, hidden, ids, slots, places, adapters):
        fed.append((not isinstance(ids, list), list(places)))
        return decode(self, hidden, ids, slots, places, adapters)

    with ahead(on), mock.patch.object(Steps, "decode", decoded):
        one_of(stage).replies(prompts((9, 3)), 4)
    assert fed == [(False, [9, 3]), (on, [10, 4]), (on, [11, 5])]


def test_a_server_takes_what_is_ahead_while_others_enter_leave_and_ask_for_more(stage):
    asked = prompts(MANY)
    answers = []
    for on in (False, True):
        listener = Stopper({1: 2, 2: 5})
        with ahead(on):
            one = one_of(stage, listened_to=True)
            one.reserve(2, 64)
            told = {3: 2}  # the log-probabilities of how many tokens
            requests = [
                Request(p, SAMPLINGS["sampled"], LONG + p.number, frozenset(), told.get(p.number)) for p in asked
            ]
            one.serve(Inbox(requests), listener, build_mesh(0, 1).world)
        answers.append((listener.replies, listener.heard))
    assert answers[0] == answers[1]
    assert [len(answers[0][0][i].token_ids) for i in range(5)] == [8, 2, 5, 11, 12]
    assert all(told == (number == 3) for number, heard in answers[0][1].items() for _, told in heard)


def behind(digest: str, texts: list[list[int]], first: int) -> list[Prompt]:
    """Prompts of one image each; `first`: the number of the first one."""
    picture, placeholder = Picture(digest, digest, 4), fields_of("blip-2, opt")["image_token_index"]
    return [Prompt(first + i, [placeholder] * 4 + ids, picture=picture) for i, ids in enumerate(texts)]


def test_keys_behind_an_image_are_reused_for_that_image_alone(monkeypatch):
    """A second question about an image goes on from the first one's keys; the same words about another do not."""
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(1, 90, (9,), generator=generator).tolist() for _ in range(2)]
    texts[1][:5] = texts[0][:5]
    asked = [*behind("a", texts, 0), *behind("b", texts, 2), *behind("a", texts[:1], 4)]
    stage, fed, prefill = make_stage(build_mesh(0, 1), "blip-2, opt"), [], Steps.prefill

    def counted(self, hidden, ids, *rest):
        fed.append(len(ids))
        return prefill(self, hidden, ids, *rest)

    def said(one):  # each in the place of the one before
        return [one.replies([prompt], NEW)[0].token_ids for prompt in asked]

    monkeypatch.setattr(Steps, "prefill", counted)
    expected = said(one_of(stage))
    assert fed == [13] * 5 and expected[0] == expected[4] != expected[2]
    monkeypatch.setattr(replica, "WORTH_KEEPING", 3)
    fed.clear()
    assert said(one_of(stage)) == expected
    assert fed == [13, 4, 13, 4, 13]


def test_a_state_goes_on_behind_all_that_it_has_read_alone(monkeypatch):
    """The next turn of a dialogue is fed from its new tokens on; a text that leaves the one before is fed whole."""
    generator = torch.Generator().manual_seed(4)
    first, more, other = (torch.randint(1, 90, (n,), generator=generator).tolist() for n in (20, 6, 9))
    stage, fed, prefill = make_stage(build_mesh(0, 1), "qwen3_5_text"), [], Steps.prefill
    said = one_of(stage).replies([Prompt(0, first)], NEW)[0].token_ids
    turns = [first, [*first, *said, *more], [*first, *said, *other], first, [*first, *more]]

    def counted(self, hidden, ids, *rest):
        fed.append(len(ids))
        return prefill(self, hidden, ids, *rest)

    monkeypatch.setattr(Steps, "prefill", counted)
    expected = [one_of(stage).replies([Prompt(0, turn)], NEW)[0].token_ids for turn in turns]
    assert fed == [20, 20 + NEW + 6, 20 + NEW + 9, 20, 26]
    monkeypatch.setattr(replica, "WORTH_KEEPING", 1)
    fed.clear()
    one = one_of(stage)
    assert [one.replies([Prompt(i, turn)], NEW)[0].token_ids for i, turn in enumerate(turns)] == expected
    # The last token of a reply is read with the next turn; a state that has read a reply cannot leave it.
    assert fed == [20, 1 + 6, 20 + NEW + 9, 20, 26]
