"""Requests of several adapters and of the base in one batch: each gets what its own adapter alone gives."""

from __future__ import annotations

import pytest
import torch
from oracle import fields_of
from spawn import spawn

from megalora.adapters.config import LoraConfig
from megalora.adapters.shared import share
from megalora.adapters.sharing import by_expert
from megalora.building import build_stage, load_adapter, resolve_lora, trained_shapes
from megalora.generation import choosing, replica
from megalora.generation.replica import Replica
from megalora.generation.requests import FAILED, INTERRUPTED, LENGTH, STOP, Change, Prompt, Request
from megalora.generation.sampling import Sampling
from megalora.models.config import config_from_dict
from megalora.models.stage import NO_LORA
from megalora.parallel.mesh import build_mesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.serving.adapters import put_adapters, room_for

FIELDS = {
    "model_type": "qwen2",  # with biases
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
ADAPTERS = (
    {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    {"r": 5, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 1}},
    {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_proj", "o_proj", "v_proj"]},
)
LATENT = fields_of("deepseek_v3")
OF_LATENTS = (
    {"r": 2, "lora_alpha": 6, "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    {"r": 5, "lora_alpha": 9, "target_modules": ["kv_b_proj"]},
    {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["o_proj", "q_b_proj"]},
)
IN_EXPERTS = ["gate_proj", "up_proj", "down_proj"]
OF_EXPERTS = (  # every expert_lora; ranks differ between experts, and linears beside experts are adapted or not
    {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "rank_pattern": {r"experts\.[13]\.down_proj": 4}},
    {"r": 3, "lora_alpha": 3, "target_modules": ["o_proj", *IN_EXPERTS], "expert_lora": "shared_a"},
    {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": IN_EXPERTS[1:], "expert_lora": "shared"},
)
OF_SOME = (  # with the router, and experts that some adapters leave alone
    {"r": 2, "lora_alpha": 6, "target_modules": ["gate", "q_proj", "experts.2.up_proj", "experts.0.down_proj"]},
    {"r": 3, "lora_alpha": 9, "target_modules": ["experts.2.up_proj", "experts.5.gate_proj"]},
    {"r": 1, "lora_alpha": 4, "target_modules": "all-linear", "exclude_modules": ["experts.0.up_proj"]},
)
FUSED = ["gate_up_proj", "down_proj"]
KINDS = {
    "qwen2": (FIELDS, ADAPTERS),
    "latent": (LATENT, OF_LATENTS),
    "experts": (fields_of("qwen3_moe"), OF_EXPERTS),
    "some experts": (fields_of("qwen3_moe"), OF_SOME),
    "experts beside one of all tokens": (fields_of("qwen2_moe"), OF_EXPERTS),
    "experts with biases": (
        fields_of("gpt_oss"),
        [
            {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
            {"r": 3, "lora_alpha": 9, "target_modules": FUSED, "expert_lora": "shared"},
            {"r": 4, "lora_alpha": 8, "target_modules": ["gate_up_proj", "q_proj"], "expert_lora": "shared_a"},
        ],
    ),
}
NEW = 7
GREEDY = Sampling()
PROMPTS = [[5 + i, 9, 40 - i, *range(3, 3 + i)] for i in range(7)]
MIXED = PROMPTS[::2]


def make_stage(lora, mesh, kind):
    place = Placement(mesh.tp, False, torch.float64, "cpu")
    stage, _ = build_stage(config_from_dict(KINDS[kind][0]), mesh, lora, place)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "lora_" not in name:  # the same on every layout: of its name, and sliced
                parameter.copy_(sliced(stage, name, draw(name, stage.config.tensors[name])))
    return stage


def sliced(stage, name, whole):
    splits = named_splits(stage)
    return splits[name].slice(whole) if name in splits else whole


def draw(name, shape):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator).double() * 0.3 + ("norm" in name)


def adapters(kind):
    """Each as it is trained: experts may share factors."""
    fields, loras = KINDS[kind]
    config = config_from_dict(fields)
    found = []
    for number, fields in enumerate(loras):
        lora = resolve_lora(LoraConfig.from_dict(fields), config)
        shapes = trained_shapes(lora, config)
        found.append((lora, {name: draw(f"{number}{name}", shape).float() for name, shape in shapes.items()}))
    return found


def as_read(kind):
    """The same as a server reads them: a factor that experts share is there for each of them."""
    config, found = config_from_dict(KINDS[kind][0]), []
    for lora, tensors in adapters(kind):
        tensors, fields = by_expert(tensors, lora.config.to_dict())
        found.append((resolve_lora(LoraConfig.from_dict(fields), config), tensors))
    return found


class Inbox:
    """Requests in small helpings, while others run."""

    def __init__(self, requests):
        self.left = list(requests)

    def wait(self, seconds):
        return self.take(2) or None

    def changing(self):
        return False

    def change(self):
        return None

    def waiting(self):
        return bool(self.left)

    def take(self, count):
        taken, self.left = self.left[: min(count, 2)], self.left[min(count, 2) :]
        return taken


class Ear:
    def __init__(self, interrupt=()):
        self.heard, self.logprobs, self.replies, self.interrupt = {}, {}, {}, dict(interrupt)

    def hear(self, prompt, token_id, logprobs):
        self.heard.setdefault(prompt.number, []).append(token_id)
        self.logprobs.setdefault(prompt.number, []).append(logprobs)
        return INTERRUPTED if self.interrupt.get(prompt.number) == len(self.heard[prompt.number]) else None

    def left(self, prompt):
        return False

    def done(self, prompt, reply):
        self.replies[prompt.number] = reply


def alone(kind="qwen2", prompts=PROMPTS):
    """The greedy reply of the base and of each adapter, loaded alone, to each prompt."""
    mesh = build_mesh(0, 1)
    found = []
    for lora, tensors in [(NO_LORA, {}), *adapters(kind)]:
        stage = make_stage(lora, mesh, kind)
        load_adapter(stage, tensors, "here")
        one = Replica(stage, mesh.pp, mesh.tp, 64, Sampling(), ())
        found.append([reply.token_ids for reply in one.replies([Prompt(i, p) for i, p in enumerate(prompts)], NEW)])
    return found


def serve(rank, world_size, tp, requests, interrupt=(), slots=4, kind="qwen2", comes_and_goes=False):
    """comes_and_goes: each adapter takes a place that another has left."""
    mesh, read = build_mesh(rank, world_size, tp, world_size // tp), as_read(kind)
    room = room_for(len(read), 6, config_from_dict(KINDS[kind][0]), of_experts=True) if comes_and_goes else None
    shared = share(read) if room is None else room.empty()
    stage = make_stage(shared.lora, mesh, kind)
    if room is None:
        load_adapter(stage, shared.tensors, "here")
    stage.share_adapters(shared.owners)
    for changes in (range(1, 3), range(3)) if room is not None else ():
        taken = [Change(place, room.fit(*read[adapter])) for place, adapter in enumerate(changes, 1)]
        put_adapters(stage, room, taken, empty=changes.start == 1)
    one = Replica(stage, mesh.pp, mesh.tp, 64, Sampling(), (), listened_to=True)
    one.reserve(slots, 64)
    inbox, ear = (Inbox(requests), Ear(interrupt)) if rank == 0 else (None, None)
    one.serve(inbox, ear, mesh.world)
    return ear and (ear.replies, ear.heard, ear.logprobs)


def request(number, adapter, prompt, new=NEW, sampling=GREEDY, stop=(), logprobs=None, stream=None):
    return Request(Prompt(number, prompt, adapter, stream), sampling, new, frozenset(stop), logprobs)


def mixed():
    return [
        request(4 * i + adapter, adapter, prompt, logprobs=2 if adapter == 1 else None)
        for i, prompt in enumerate(MIXED)
        for adapter in (i % 4, (i + 1) % 4)
    ]


def twice(rank, world_size, requests, kind):
    """With the adapters of the start, and with others that come while it runs."""
    return [serve(rank, world_size, 2, requests, kind=kind, comes_and_goes=comes) for comes in (False, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_gives_each_its_own(kind):
    """On one process, and over tensor and pipeline parallel ranks; requests join while others run."""
    expected, requests = alone(kind, MIXED), mixed()
    assert len({tuple(replies) for replies in expected}) == 4, "the adapters reply alike"
    ranks = [serve(0, 1, 1, requests, kind=kind), *spawn(twice, 4, requests, kind)[0]]
    for replies, heard, logprobs in ranks:
        for one in requests:
            number, adapter = one.prompt.number, one.prompt.adapter
            wanted = expected[adapter][MIXED.index(one.prompt.token_ids)]
            assert replies[number].token_ids == wanted and replies[number].finish_reason == LENGTH
            assert heard[number] == list(wanted)
            if adapter != 1:
                assert set(logprobs[number]) == {None}
            for token, told in zip(wanted, logprobs[number] if adapter == 1 else (), strict=False):
                assert told.likeliest[0] == (token, told.chosen) and len(told.likeliest) == 2
                assert told.likeliest[1][1] <= told.chosen < 0
    for some in zip(*(one[2].values() for one in ranks), strict=True):
        for told in some[1:]:
            torch.testing.assert_close([t.chosen for t in some[0] if t], [t.chosen for t in told if t])


def test_each_request_has_its_own_way():
    """Sampling, seed, length, stop tokens and interruption of one do not touch the others."""
    hot = Sampling(temperature=1.5, top_k=20, seed=7)
    greedy = alone()[2]
    stop = greedy[1][4]
    requests = [
        request(0, 2, PROMPTS[0]),
        request(1, 2, PROMPTS[1], stop=[stop]),
        request(2, 2, PROMPTS[2], new=3),
        request(3, 2, PROMPTS[3], sampling=hot, stream=0),
        request(4, 2, PROMPTS[4]),
        request(5, 2, PROMPTS[3], sampling=hot, stream=0),
        request(6, 2, PROMPTS[3], sampling=hot, stream=1),
        request(7, 2, PROMPTS[0], sampling=Sampling(repetition_penalty=5.0)),
        request(8, 2, PROMPTS[0], new=500),
    ]
    replies, heard, _ = serve(0, 1, 1, requests, interrupt={4: 5}, slots=3)
    assert replies[0].token_ids == greedy[0]
    cut = greedy[1].index(stop)
    assert (replies[1].token_ids, replies[1].finish_reason) == (greedy[1][:cut], STOP)
    assert (replies[2].token_ids, replies[2].finish_reason) == (greedy[2][:3], LENGTH)
    assert (replies[4].token_ids, replies[4].finish_reason) == (greedy[4][:5], INTERRUPTED)
    assert replies[3] == replies[5] != replies[6]
    assert len(set(replies[7].token_ids)) == NEW and replies[7] != replies[0]
    assert len(replies[8].token_ids) == 64 - len(PROMPTS[0]), "the context ends it"


def test_logits_that_are_not_finite_end_their_request_alone(monkeypatch):
    choose, broken = choosing.choose, Sampling(temperature=1.0, top_k=3)

    def spoiled(logits, sampling, draws):
        return torch.full((len(logits),), -1) if sampling == broken else choose(logits, sampling, draws)

    monkeypatch.setattr(choosing, "choose", spoiled)
    replies, heard, _ = serve(0, 1, 1, [request(0, 1, PROMPTS[0]), request(1, 1, PROMPTS[1], sampling=broken)])
    assert (replies[1].token_ids, replies[1].finish_reason) == ((), FAILED) and 1 not in heard
    assert replies[0].token_ids == alone()[1][0]


def test_a_slot_of_another_adapter_is_no_beginning(monkeypatch):
    """Keys and values of the same tokens are another adapter's: they are made anew."""
    monkeypatch.setattr(replica, "WORTH_KEEPING", 1)
    expected = alone()
    requests = [request(number, number % 4, PROMPTS[6]) for number in range(8)]
    replies, *_ = serve(0, 1, 1, requests, slots=1)
    for number in range(8):
        assert replies[number].token_ids == expected[number % 4][6], number

