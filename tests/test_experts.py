"""Models of experts: the same numbers on every layout, and those of transformers.

transformers keeps a layer's experts in two stacked weights, and peft adapts those as a whole, so the other side here
is the merged model: with W + s B A for W, dA = s B^T dW and dB = s dW A^T.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import sys
from dataclasses import replace

import oracle
import pytest
import torch
import transformers
from oracle import ALL_LINEAR, EXPERTS, Run, fields_of, in_file_order, largest_difference, reference, train, train_each
from safetensors.torch import save_file
from spawn import spawn
from test_field_parity import documents
from variants import check_greedy, class_of, model_class, with_float64

from megalora.adapters.config import LoraConfig
from megalora.adapters.sharing import in_common
from megalora.batch import Batch
from megalora.building import base_names, load_adapter, resolve_lora
from megalora.checkpoint.adapter.peft import dropout_caution, peft_caution, read_peft, write_peft
from megalora.checkpoint.base.weights import load_base
from megalora.errors import UserError
from megalora.generation.cache import Span
from megalora.generation.steps import Steps
from megalora.models.blocks.experts import choose
from megalora.models.config import check_layout, config_from_dict
from megalora.models.inputs import training_inputs
from megalora.models.linears import Linear
from megalora.models.routers import Router
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits

EVERY = ALL_LINEAR | {"target_modules": r"model\.layers\..*"}  # routers too
STATES = ("qwen3_next", "lfm2_moe", "granitemoehybrid", "nemotron_h, experts")
HYBRID = {"qwen3_5_moe_text", *STATES}  # in most of whose layers states decay, or channels are gated
TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


EVERY_RUN = os.environ.get("MEGALORA_PROOF") == "all"
LAYOUTS = (  # of four processes
    {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"},
    {"tp": 2, "sequence_parallel": True, "exchange": True, "micro_batch_rows": 2},
)


def layouts(every: bool = False) -> list[Run]:
    """Each family on one of LAYOUTS, in turn, and short; every: on all of them, and longer."""
    runs = []
    for number, family in enumerate(EXPERTS):
        # Small gradients of decays: a second step of Adam would multiply their rounding.
        more = {"steps": 1, "learning_rate": 1e-4} if family in HYBRID else {}
        runs += [Run(family, lora=EVERY, **one, **more) for one in (LAYOUTS if every else [LAYOUTS[number % 2]])]
    runs += [
        Run("qwen2_moe", tp=4, micro_batch_rows=2, lora=EVERY),
        Run("qwen3_moe", tp=4, micro_batch_rows=2, base_format="nf4"),
        Run("qwen3_moe", tp=2, pp=2, base_format="nf4_fp8"),
        Run("deepseek_v3", tp=2, pp=2, base_format="fp8"),
        Run("qwen3_next", tp=4, base_format="nf4", steps=1, learning_rate=1e-4),
    ]
    return runs if every else [short(run, 4) for run in runs]


def short(run: Run, processes: int) -> Run:
    """In rows long enough that every expert has tokens."""
    return run.short(processes).on(seq_length=72)


def all_on_the_first(rank: int, world_size: int, run: Run):
    """A run whose routers see no difference: every token goes to the experts of the lowest numbers."""
    fill = oracle.fill

    def tied(stage: Stage) -> None:
        fill(stage)
        for name, parameter in stage.named_parameters():
            if re.search(r"\.(gate|router)\.weight$", name):
                parameter.data.zero_()

    oracle.fill = tied
    try:
        return train(rank, world_size, run)
    finally:
        oracle.fill = fill


def each(rank: int, world_size: int, runs: list[Run], tied: Run):
    return train_each(rank, world_size, runs), all_on_the_first(rank, world_size, tied)


def test_every_layout_gives_the_numbers_of_one_process():
    """`make proof`: each family on both layouts, and longer."""
    runs = layouts(EVERY_RUN)
    tied = Run("qwen3_moe", tp=4, sequence_parallel=True, lora=ALL_LINEAR | {"target_modules": TARGETS}).short(4)
    ranks = spawn(each, 4, runs, tied)
    for i, run in enumerate(runs):
        assert largest_difference(reference(run), [outcomes[i] for outcomes, _ in ranks]) <= 1e-12, run
    alone = all_on_the_first(0, 1, tied.on(tp=1, sequence_parallel=False))
    assert largest_difference(alone, [outcome for _, outcome in ranks]) <= 1e-12
    idle = [name for name, (_, gradient) in alone.gradients.items() if not gradient.any()]
    assert {name.split(".")[5] for name in idle} == {"2", "3", "4", "5"}, "top 2 of 6, all equal: experts 0 and 1"


ALL_EXPERTS = ALL_LINEAR | {"target_modules": r".*\.(experts\..*|q_proj)"}


def test_shared_factors_give_the_numbers_of_one_process():
    """A, or A and B, of all experts of a layer in one: over tp 1, 2 and 4, with stages and replicas."""
    runs = []
    for mode, family in (("shared_a", "qwen3_moe"), ("shared", "mixtral"), ("shared_a", "gpt_oss")):
        run = Run(family, lora=ALL_EXPERTS | {"expert_lora": mode})
        runs += [run.on(tp=2, pp=2, recompute="full"), run.on(tp=4, micro_batch_rows=2, sequence_parallel=True)]
        runs += [run.on(tp=2), run.on(pp=2)]  # with two replicas each
    runs = [short(run, 4) for run in runs]
    for run, outcomes in zip(runs, zip(*spawn(train_each, 4, runs), strict=True), strict=True):
        expected = reference(run)
        assert largest_difference(expected, list(outcomes)) <= 1e-12, run
        names = {name for name in expected.adapters if ".experts." in name and "lora_A" in name}
        assert all(name.rpartition(".experts.")[2][0] not in "0123456789" for name in names) and names
    plain = reference(runs[0].on(lora=ALL_EXPERTS))
    assert abs(plain.losses[-1] - reference(runs[0]).losses[-1]) > 1e-6, "sharing matters"


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mode", ["shared_a", "shared"])
def test_shared_factors_are_written_for_each_expert(family, mode, tmp_path):
    """What is exported, read again by a model without sharing, has the same hidden states to the last bit."""
    config, ids = config_from_dict(fields_of(family)), [5, 17, 99, 3, 42, 8, 120, 61]
    lora = LoraConfig.from_dict(ALL_EXPERTS | {"expert_lora": mode, "lora_dropout": 0.0})
    whole = range(config.num_hidden_layers)
    stages = []
    for resolved in (resolve_lora(lora, config), None):
        if resolved is None:
            read = read_peft(tmp_path)
            resolved = resolve_lora(LoraConfig.from_dict(read.lora_config), config)
        stage = Stage(config, whole, Placement(Axis(), False, torch.float32, "cpu"), resolved)
        oracle.fill(stage)
        if stages:
            load_adapter(stage, read.tensors, read.where)
        else:
            splits = named_splits(stage)
            tensors = {name: in_file_order(splits[name], p.detach()) for name, p in stage.trainable().items()}
            write_peft(tmp_path, tensors, resolved.config.to_dict())
        stage.refresh_adapters()
        stages.append(stage)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"expert_lora", "expert_count"} & written.keys()
    a, b = (sum(p.numel() for p in stage.trainable().values()) for stage in stages)
    assert a < b
    with torch.no_grad():
        assert torch.equal(*(alone(stage, ids) for stage in stages))
    back = in_common(read.tensors, mode, "here")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], one) for name, one in tensors.items())
    name = next(name for name in read.tensors if ".experts.3." in name and "lora_A" in name)
    with pytest.raises(UserError, match=re.escape(f"experts have factors of their own ({name})")):
        in_common(read.tensors | {name: read.tensors[name] + 1}, mode, "here")


@pytest.mark.parametrize(
    "family, fields, said",
    [
        ("qwen3_moe", {"expert_lora": "both"}, "expert_lora = 'both' is not valid"),
        ("qwen3_moe", {"expert_lora": "shared_a", "target_modules": ["q_proj"]}, "but no linear of experts is adapted"),
        ("llama", {"expert_lora": "shared", "target_modules": ["q_proj"]}, "but no linear of experts is adapted"),
        ("qwen3_moe", {"expert_lora": "shared", "rank_pattern": {r"experts\.3\.up_proj": 2}}, "several ranks"),
        ("qwen3_moe", {"expert_lora": "shared", "target_modules": r".*experts\.[0-3]\..*"}, "several ranks"),
        ("qwen3_moe", {"expert_lora": "shared_a", "r": 4, "init_lora_weights": "orthogonal"}, "orthogonal"),
    ],
)
def test_factors_that_cannot_be_shared(family, fields, said):
    with pytest.raises(UserError, match=re.escape(said)):
        resolve_lora(LoraConfig.from_dict(ALL_LINEAR | fields), config_from_dict(fields_of(family)))


NINE = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 9)
NINE |= {"n_group": 3, "topk_group": 2}


def of_eight(family: str) -> Run:
    """On eight processes, which hold two or one of nine experts each."""
    model = {name: value for name, value in NINE.items() if name in EXPERTS[family]}
    return Run(family, tp=8, micro_batch_rows=2, lora=EVERY, model=model, rows=8, seq_length=72)


def test_eight_tensor_parallel_ranks():
    """Experts are dealt unevenly; one expert gets every token of a batch, and seven ranks have nothing to do."""
    families = EXPERTS if EVERY_RUN else ["qwen2_moe"]
    runs = [of_eight(family).on(sequence_parallel=i % 2 == 0) for i, family in enumerate(families)]
    alone = of_eight("llama4_text").on(lora=ALL_LINEAR)  # whose routers stay tied
    if not EVERY_RUN:
        runs, alone = [short(run, 8) for run in runs], short(alone, 8)
    ranks = spawn(each, 8, runs, alone)
    for i, run in enumerate(runs):
        assert largest_difference(reference(run), [outcomes[i] for outcomes, _ in ranks]) <= 1e-12, run
    expected = all_on_the_first(0, 1, alone.on(tp=1))
    assert largest_difference(expected, [outcome for _, outcome in ranks]) <= 1e-12
    busy = {name.split(".")[5] for name, (_, grad) in expected.gradients.items() if ".experts." in name and grad.any()}
    assert busy == {"0"}, "top 1 of 9, all equal: expert 0"


def test_ranks_and_scales_of_single_experts():
    lora = ALL_LINEAR | {
        "use_rslora": True,
        "rank_pattern": {r"experts\.[12]\.gate_proj": 5, r"experts\.3\.down_proj": 1},
        "alpha_pattern": {r"experts\.0\.up_proj": 11},
    }
    run = Run("qwen3_moe", lora=lora)
    assert reference(run).adapters["model.layers.0.mlp.experts.3.down_proj.lora_A.weight"][1].shape == (1, 24)


# ---- transformers


MIXTRAL = {"mixtral", "minimax_m2"}  # with its names in the files: transformers' modules have others
NUMBERED = MIXTRAL | {"lfm2_moe", "phimoe"}  # whose linears are w1, w2 and w3
# Parts of names in transformers' modules -> in the files.
RENAMED = {kind: {".mlp.": ".block_sparse_moe."} for kind in MIXTRAL}
RENAMED["phimoe"] = {".mlp.router.": ".block_sparse_moe.gate.", ".mlp.": ".block_sparse_moe."}
RENAMED |= dict.fromkeys(
    ("granitemoe", "granitemoeshared", "granitemoehybrid"),
    {
        ".experts.gate_up_proj": ".input_linear.weight", ".experts.down_proj": ".output_linear.weight",
        ".router.weight": ".router.layer.weight",
    },
)  # fmt: skip
RENAMED["exaone_moe"] = {".mlp.gate.e_score_correction_bias": ".mlp.e_score_correction_bias"}
RENAMED |= {"ernie4_5_moe": {".gate.moe_statics.": ".moe_statics."}}


def plain_names(family: str, model) -> dict[str, tuple[torch.Tensor, torch.nn.Parameter]]:
    """Our name of each weight -> where it lies in transformers' module, and the parameter that holds it."""
    found = {}
    stacks = config_from_dict(fields_of(family)).stacks
    gate, up, down = ("w1", "w3", "w2") if family in NUMBERED else ("gate_proj", "up_proj", "down_proj")
    held = ("e_score_correction_bias", "expert_bias", "layer_scalar")
    corrections = ((n, b) for n, b in model.named_buffers() if n.endswith(held))
    for name, parameter in (*model.named_parameters(), *corrections):
        for theirs, ours in RENAMED.get(family, {}).items():
            name = name.replace(theirs, ours)
        if name in stacks:
            found |= {ours: (part, parameter) for ours, part in zip(stacks[name], parameter, strict=True)}
            continue
        if name.endswith("experts.gate_up_proj"):
            for e, weight in enumerate(parameter):
                for half, part in zip(weight.chunk(2), (gate, up), strict=True):
                    found[f"{name.removesuffix('gate_up_proj')}{e}.{part}.weight"] = half, parameter
        elif name.endswith(("experts.down_proj", "experts.up_proj")):
            stem, _, last = name.rpartition(".")
            for e, weight in enumerate(parameter):
                found[f"{stem}.{e}.{down if last == 'down_proj' else last}.weight"] = weight, parameter
        else:
            found[name] = parameter, parameter
    return found


@pytest.fixture
def precise_norm(monkeypatch):
    """RMSNorm and the routers' softmax of transformers in the dtype of their input."""

    def forward(self, x):
        eps = getattr(self, "variance_epsilon", None) or self.eps
        offset = type(self).__name__.startswith(("Qwen3Next", "Qwen3_5"))
        return (getattr(self, "weight", 1) + offset) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    for family in EXPERTS:
        modeling = sys.modules[model_class(EXPERTS[family]["model_type"]).__module__]
        for name in [name for name in vars(modeling) if name.endswith(("RMSNorm", "L2Norm")) and name[0] != "_"]:
            monkeypatch.setattr(getattr(modeling, name), "forward", forward)
        routers = ("topkrouter", "llama4router", "textrouter", "v1gate")
        for name in [name for name in vars(modeling) if name.lower().endswith(routers)]:
            router = getattr(modeling, name)
            monkeypatch.setattr(router, "forward", in_double(router.forward))
        for name in [name for name in vars(modeling) if name.endswith(("GatedDeltaNet", "MambaLayer", "Mamba2Mixer"))]:
            mixer = getattr(modeling, name)
            wide = functools.partialmethod(forward_in_float64, modeling, mixer.forward)
            monkeypatch.setattr(mixer, "forward", wide)


def forward_in_float64(self, modeling, forward, *given, **named):
    return with_float64(modeling, forward, self, *given, **named)


def in_double(forward):
    """The router `forward` whose float32 is float64."""
    softmax, wide = torch.nn.functional.softmax, torch.float64

    def run(self, *inputs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x.to(wide), dim))
            patch.setattr(torch.Tensor, "float", lambda self: self.to(wide))
            patch.setattr(torch.Tensor, "type", lambda self, dtype: self.to(wide))
            return forward(self, *inputs)

    return run


@pytest.fixture(autouse=True)
def clamped_as_configured(monkeypatch):
    """transformers 5.17 clamps gpt_oss at 7, whatever the configuration says."""
    if "gpt_oss" not in transformers.CONFIG_MAPPING:
        return
    experts = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss").GptOssExperts
    made = experts.__init__

    def configured(self, config):
        made(self, config)
        self.limit = config.swiglu_limit

    monkeypatch.setattr(experts, "__init__", configured)


# Those whose rotations, norms, routers, temperatures, sinks, logits or scale of the embedding transformers has in
# float32.
IN_FLOAT32 = (
    "afmoe", "cohere2_moe", "deepseek_v2", "ernie4_5_moe", "gemma4_text, experts", "granitemoe_swa", "llama4_text",
    "mistral4", "nemotron_h, experts",
)  # fmt: skip


@pytest.mark.parametrize("family", EXPERTS)
def test_loss_and_gradients_are_those_of_the_merged_model(family, precise_norm):
    lora, dtype = EVERY | {"lora_dropout": 0.0}, torch.float64
    config = config_from_dict(fields_of(family))
    resolved = resolve_lora(LoraConfig.from_dict(lora), config)
    stage = Stage(config, range(config.num_hidden_layers), Placement(Axis(), False, dtype, "cpu"), resolved)
    oracle.fill(stage)
    stage.refresh_adapters()
    splits, trained = named_splits(stage), stage.trainable()
    ours = {name: in_file_order(splits[name], p.detach()) for name, p in stage.named_parameters()}
    fields = fields_of(family)
    kind = fields.pop("model_type")
    model = model_class(kind)._from_config(
        transformers.CONFIG_MAPPING[class_of(kind)](**fields),
        attn_implementation="eager" if family in ("gpt_oss", "granitemoe_swa") else "sdpa",
        experts_implementation="eager",
    ).to(dtype)
    model.train(family != "phimoe")  # which draws experts at random there, and a gradient of its own
    places = plain_names(family, model)
    assert set(places) == {name for name in config.tensors}
    with torch.no_grad():
        for name, (place, _) in places.items():
            place.copy_(merged(name, ours, config, resolved))
    ours_loss, theirs_loss = 0.0, 0.0
    for row in documents(config.vocab_size):
        for document in row:
            ids, labels = (torch.from_numpy(x).long() for x in (document.input_ids, document.labels))
            count = len(ids)
            shifted = torch.cat([labels[1:], torch.tensor([-100])])
            batch = Batch(
                ids, shifted, torch.arange(count), torch.tensor([0, count], dtype=torch.int32), torch.arange(count)
            )
            loss = stage(None, training_inputs(batch, config, stage.place, seed=1, step=0))
            loss.backward()
            ours_loss += loss.item()
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
            loss.backward()
            theirs_loss += loss.item()
    tolerance = 1e-5 if family in IN_FLOAT32 else 1e-10
    assert abs(ours_loss - theirs_loss) <= tolerance * abs(theirs_loss)
    for name, adapter in resolved.adapters.items():
        place, holder = places[f"{name}.weight"]
        offset = place.storage_offset() - holder.storage_offset()
        dW = holder.grad.contiguous().as_strided(place.shape, place.stride(), offset)
        dW = dW.T if config.linears[name].linear.transposed else dW
        keys = [f"{name}.{factor}.weight" for factor in ("lora_A", "lora_B")]
        A, B = (ours[key] for key in keys)
        for key, expected in zip(keys, (adapter.scaling * B.T @ dW, adapter.scaling * dW @ A.T), strict=True):
            grad = in_file_order(splits[key], trained[key].grad)
            assert expected.abs().max() > 1e-9, name
            assert (grad - expected).abs().max() <= tolerance * expected.abs().max(), name


def merged(name: str, ours: dict, config, lora) -> torch.Tensor:
    linear = name.removesuffix(".weight")
    adapter = lora.adapter(linear) if name.endswith(".weight") else None
    if adapter is None:
        return ours[name]
    A, B = (ours[f"{linear}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
    delta = adapter.scaling * B @ A
    return ours[name] + (delta.T if config.linears[linear].linear.transposed else delta)


# ---- the choice


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[0.2, 0.2, 0.1, 0.2], [0.1, 0.3, 0.3, 0.3]])
    assert choose(scores, Router(Linear("gate", 8, 4), 2)).tolist() == [[0, 1], [1, 2]]


def test_groups_limit_the_choice():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.45, 0.3, 0.2]])
    by_best = Router(Linear("gate", 8, 6), 2, groups=3, kept_groups=1, group_top=1)
    by_two = Router(Linear("gate", 8, 6), 3, groups=3, kept_groups=2, group_top=2)
    assert choose(scores, by_best).tolist() == [[0, 1]]
    assert choose(scores, by_two).tolist() == [[0, 2, 3]]


@pytest.mark.parametrize(
    "family, fields, said",
    [
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok (9) is more than the number of experts (5)"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not implemented"),
        ("qwen3_moe", {"output_router_logits": True}, "output_router_logits = True is not implemented"),
        ("qwen2_moe", {"num_experts": 0}, "num_experts = 0 is not valid: give a whole number from 1"),
    ],
)
def test_bad_configs_are_refused_by_name(family, fields, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config_from_dict(fields_of(family, **fields))


@pytest.mark.parametrize(
    "family, change, said",
    [
        ("qwen3_moe", {"mlp.experts.3.up_proj.weight": None}, "lacks model.layers.1.mlp.experts.3.up_proj.weight"),
        ("mixtral", {"block_sparse_moe.experts.4.w2.weight": (48, 8)}, "config.json means [48, 80]"),
        ("qwen2_moe", {"mlp.experts.8.up_proj.weight": (24, 48)}, "mlp.experts.8.up_proj.weight"),
        ("glm4_moe", {"mlp.gate.e_score_correction_bias": (5,)}, "config.json means [6]"),
        ("deepseek_v3", {"mlp.gate.e_score_correction_bias": None}, "mlp.gate.e_score_correction_bias"),
        ("llama4_text", {"feed_forward.router.weight": (5, 48)}, "config.json means [6, 48]"),
        ("llama4_text", {"feed_forward.experts.down_proj": (5, 32, 48)}, "config.json means 6 experts"),
    ],
)
def test_damaged_files_are_one_line(family, change, said, tmp_path):
    """Experts that are missing, of another shape or too many, and routers for another number of them."""
    config, layer = config_from_dict(fields_of(family)), 2 if family == "glm4_moe" else 1
    inside = {part for parts in config.stacks.values() for part in parts}
    shapes = {name: shape for name, shape in config.tensors.items() if name not in inside}
    shapes |= {name: (len(parts), *config.tensors[parts[0]]) for name, parts in config.stacks.items()}
    for name, shape in change.items():
        name = f"model.layers.{layer}.{name}"
        shapes |= {name: shape}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stage = Stage(config, range(3), Placement(Axis(), False, torch.float32, "cpu"), NO_LORA)
    with pytest.raises(UserError) as caught:
        load_base(stage, tmp_path, splits=named_splits(stage), names=base_names(config))
    assert said in caught.value.message and "\n" not in caught.value.message and caught.value.hint


def test_fewer_experts_than_ranks_are_refused():
    with pytest.raises(UserError, match=re.escape("tensor_parallel_size (8) is more than the number of experts (5)")):
        check_layout(config_from_dict(fields_of("mixtral")), 8, 1)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_what_experts_cannot_carry_is_refused(field):
    config = config_from_dict(fields_of("mixtral"))
    lora = resolve_lora(LoraConfig.from_dict(ALL_LINEAR | {field: True}), config)
    with pytest.raises(UserError, match=f"lora_config: {field} is not implemented for the linears of experts"):
        Stage(config, range(4), Placement(Axis(), False, torch.float32, "cpu"), lora)


# ---- generation


CACHED = ("qwen2_moe", *STATES, "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text")


@pytest.mark.parametrize("family", CACHED)
def test_a_cache_gives_the_hidden_states_of_whole_sequences(family):
    """Prompts of two lengths, one that goes on from what the cache holds, then single tokens: adapters in force."""
    config = config_from_dict(fields_of(family))
    lora = resolve_lora(LoraConfig.from_dict(EVERY), config)
    stage = Stage(config, range(config.num_hidden_layers), Placement(Axis(), False, torch.float64, "cpu"), lora)
    oracle.fill(stage)
    stage.refresh_adapters()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, config.vocab_size, (length,), generator=generator).tolist() for length in (9, 12)]
    with torch.no_grad():
        expected = [alone(stage, ids) for ids in texts]
        steps = Steps(stage, 2, 16)
        first = steps.prefill(None, texts[0][:7] + texts[1][:4], [Span(0, 0, 7), Span(1, 0, 4)])
        close(first, torch.cat([expected[0][:7], expected[1][:4]]))
        close(steps.prefill(None, texts[1][4:10], [Span(1, 4, 10)]), expected[1][4:10])
        for i in range(2):
            hidden = steps.decode(None, [texts[0][7 + i], texts[1][10 + i]], [0, 1], [7 + i, 10 + i])
            close(hidden, torch.stack([expected[0][7 + i], expected[1][10 + i]]))
    sizes = {tuple(x.whole.shape[1:]) for pair in steps._cache._layers.values() for x in pair}
    if family.startswith("deepseek"):
        assert sizes == {(1, 16, 24)}, "a token takes one latent and its rotated features, whatever the heads"


OF_LATENTS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latents_with_factors_and_biases(family, field):
    """The products with kv_b_proj move to queries and results: so do DoRA's factors, and biases of B."""
    config = config_from_dict(fields_of(family))
    targets = [name for name in OF_LATENTS if any(n.endswith(f".{name}") for n in config.linears)]
    lora = resolve_lora(LoraConfig.from_dict({"r": 3, "target_modules": targets, field: True}), config)
    stage = Stage(config, range(config.num_hidden_layers), Placement(Axis(), False, torch.float64, "cpu"), lora)
    oracle.fill(stage)
    stage.refresh_adapters()
    ids = torch.randint(0, config.vocab_size, (12,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        expected = alone(stage, ids)
        steps = Steps(stage, 1, 16)
        close(steps.prefill(None, ids[:9], [Span(0, 0, 9)]), expected[:9])
        for place in range(9, 12):
            close(steps.decode(None, [ids[place]], [0], [place])[0], expected[place])


@pytest.mark.parametrize("family", EXPERTS)
def test_greedy_replies_are_those_of_transformers(family, tmp_path):
    check_greedy(family, tmp_path, "eager")


def alone(stage: Stage, ids: list[int]) -> torch.Tensor:
    """The final hidden states of one document."""
    count = len(ids)
    bounds = torch.tensor([0, count], dtype=torch.int32)
    batch = Batch(torch.tensor(ids), torch.full((count,), -100), torch.arange(count), bounds, torch.arange(count))
    return stage(None, replace(training_inputs(batch, stage.config, stage.place, seed=None, step=0), labels=None))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def test_all_linear_leaves_routers_out_and_names_adapt_them():
    config = config_from_dict(fields_of("qwen2_moe"))
    every = resolve_lora(LoraConfig.from_dict(ALL_LINEAR), config).adapters
    assert config.routers and not config.routers & every.keys()
    assert "model.layers.0.mlp.shared_expert_gate" in every
    named = resolve_lora(LoraConfig.from_dict(ALL_LINEAR | {"target_modules": ["gate"]}), config).adapters
    assert named.keys() == config.routers


# ---- peft


def test_an_export_has_what_peft_takes_with_experts(tmp_path):
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{n}.lora_{f}.weight": torch.zeros(2, 2)
        for e in range(2) for n in ("gate_proj", "up_proj", "down_proj") for f in "AB"
    }  # fmt: skip
    fields = {"target_modules": "all-linear", "lora_dropout": 0.1, "r": 2}
    write_peft(tmp_path / "peft", tensors, fields)
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (written["lora_dropout"], written["target_modules"]) == (0.0, ["down_proj", "gate_proj", "up_proj"])
    assert read_peft(tmp_path / "peft").tensors.keys() == tensors.keys()
    modules = {name.partition(".lora_")[0] for name in tensors}
    assert "says lora_dropout 0 instead of 0.1" in dropout_caution(fields, modules)
    assert dropout_caution(fields | {"lora_dropout": 0.0}, modules) is None
    assert dropout_caution(fields, {"model.layers.0.mlp.gate_proj"}) is None


EXPERT, SHARED = "model.layers.1.mlp.experts.0.gate_proj", "model.layers.1.mlp.shared_experts.gate_proj"


@pytest.mark.parametrize(
    "kind, adapted, said",
    [
        ("mixtral", ["model.layers.0.block_sparse_moe.experts.0.w1"], None),
        ("qwen3_moe", [EXPERT, "model.layers.1.self_attn.q_proj"], None),
        ("deepseek_v3", [EXPERT], None),
        ("qwen3_moe", [EXPERT, "model.layers.1.mlp.gate"], "routers"),
        ("qwen2_moe", [EXPERT], "does not load adapters of experts"),
        ("lfm2_moe", ["model.layers.1.feed_forward.experts.0.w1"], "does not load adapters of experts"),
        ("lfm2_moe", ["model.layers.1.conv.out_proj", "model.layers.0.feed_forward.w1"], None),
        ("nemotron_h", ["model.layers.1.mixer.experts.0.up_proj"], "does not load adapters of experts"),
        ("phimoe", ["model.layers.1.block_sparse_moe.experts.0.w1"], "does not load adapters of experts"),
        ("nemotron_h", ["model.layers.1.mixer.up_proj"], None),
        ("falcon_h1", ["model.layers.1.mamba.out_proj"], "refuses adapters of out_proj"),
        ("falcon_h1", ["model.layers.1.mamba.in_proj"], None),
        ("deepseek_v3", [EXPERT, SHARED], "mixes up"),
        ("deepseek_v3", [EXPERT, "model.layers.0.mlp.up_proj"], "mixes up"),
        ("deepseek_v3", ["model.layers.1.self_attn.q_a_proj"], None),
        ("glm4_moe_lite", [EXPERT, SHARED], "mixes up"),
        ("qwen3_moe", [EXPERT, "model.layers.0.mlp.up_proj"], "mixes up"),
    ],
)
def test_what_peft_reads_wrong_is_said(kind, adapted, said):
    routers = [name for name in adapted if name.endswith(".gate")]
    caution = peft_caution(kind, adapted, routers)
    assert caution is None if said is None else said in caution and "adapter merge" in caution
