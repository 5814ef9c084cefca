"""Against transformers and peft: the same tiny random model, the same adapter, the same losses and gradients.

Both sides take every weight from its name (`oracle.whole_tensor`). Theirs reads one document at a time, ours a
packed batch. transformers computes RMSNorm in float32 even in a float64 model: with that one function replaced by
a float64 one, both sides must agree to 1e-10; untouched, in float32, to 1e-5 of a tensor's largest gradient.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

import peft
import pytest
import torch
import transformers
from oracle import FAMILIES, TINY, whole_tensor
from spawn import spawn

from megalora.adapters.config import LoraConfig
from megalora.adapters.lora import initial_factor
from megalora.adapters.targets import DEFAULT_TARGET_MODULES
from megalora.adapters.words import TOKENS
from megalora.building import resolve_lora
from megalora.data import build_rows
from megalora.data.loader import Loader
from megalora.data.template import Sample
from megalora.models.config import config_from_dict
from megalora.models.inputs import training_inputs
from megalora.models.spec import ModelSpec
from megalora.models.stage import Stage
from megalora.parallel.grads import FlatGradients
from megalora.parallel.group import LinearGroup
from megalora.parallel.mesh import build_mesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

LORA = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "target_modules": "all-linear"}
SEQ_LENGTH = 40
LENGTHS = ((17, 12, 8), (40,), (5, 30), (2,))  # of the documents of each row; the rest of a row is padding


@dataclass(frozen=True)
class Case:
    """model: fields over oracle.TINY and the family's; new_form: rope as `rope_parameters` (ours only)."""

    family: str = "llama"
    model: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    new_form: bool = False

    @property
    def raw(self) -> dict:
        return TINY | FAMILIES[self.family] | self.model


def documents(vocab_size: int) -> list[list[Sample]]:
    """Rows of random documents, with labels on their last two thirds."""
    generator = torch.Generator().manual_seed(3)

    def document(length: int) -> Sample:
        ids = torch.randint(0, vocab_size, (length,), generator=generator)
        labels = torch.where(torch.arange(length) >= length // 3, ids, -100)
        return Sample(ids.numpy().astype("int32"), labels.numpy().astype("int32"))

    return [[document(length) for length in row] for row in LENGTHS]


def in_both_forms(raw: dict) -> tuple[dict, dict]:
    """(old form, new form) of the rope fields of a config."""
    plain = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling", "rope_parameters")}
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {"rope_type": "default"})
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    scaling = None if rope["rope_type"] == "default" else rope
    old = plain | {"rope_theta": theta, "rope_scaling": scaling}
    return old, plain | {"rope_parameters": rope | {"rope_theta": theta}}


# ---- ours


def ours(rank: int, world_size: int, case: Case, dtype: torch.dtype):
    """(loss sum, {name: (place, gradient)}) of all rows in one packed batch, on tp = world_size."""
    mesh = build_mesh(rank, world_size, tp=world_size)
    old, new = in_both_forms(case.raw)
    config = config_from_dict(new if case.new_form else old)
    lora = resolve_lora(LoraConfig.from_dict(LORA | case.lora), config)
    place = Placement(mesh.tp, world_size > 1, dtype, "cpu")
    stage = Stage(config, range(config.num_hidden_layers), place, lora)
    parameters, splits = dict(stage.named_parameters(remove_duplicate=False)), named_splits(stage)
    with torch.no_grad():
        for name, split in splits.items():
            parameters[name].copy_(split.slice(weight(name, split.global_shape, config)))
    stage.refresh_adapters()
    gradients = FlatGradients(stage.trainable(), splits, mesh)
    rows = documents(config.vocab_size)
    members = list(itertools.accumulate(map(len, rows), initial=0))
    bins = [list(range(a, b)) for a, b in itertools.pairwise(members)]
    packed = build_rows([document for row in rows for document in row], bins, SEQ_LENGTH, pad_token_id=0)
    loader = Loader(packed, micro_batch_rows=len(rows), num_microbatches=1, dp_rank=0, dp_size=1, seed=0, shuffle=False)
    loss = stage(None, training_inputs(loader.step(0).microbatches[0], config, place, seed=1, step=0))
    loss.backward()
    gradients.reduce()
    return loss.item(), {name: (splits[name], p.grad.clone()) for name, p in stage.trainable().items()}


def weight(name: str, shape: tuple[int, ...], config: ModelSpec) -> torch.Tensor:
    """The whole tensor of that name, ours or that of transformers' modules."""
    ours = config.files.ours(name, config.tensors)
    tied = config.head.tied and ours == config.head.weight
    if config.head.tied and "trainable_tokens" in name:  # rows of a tied head are the embedding's
        ours = f"{config.embedding.name}.{TOKENS}"
    return whole_tensor(config.embedding.weight if tied else ours, shape, 0.15)


# ---- theirs


def peft_model(case: Case, **model_options) -> peft.PeftModel:
    old, _ = in_both_forms(case.raw)
    kind = old.pop("model_type")
    config = transformers.CONFIG_MAPPING[kind](**old)
    model = transformers.AutoModelForCausalLM.from_config(config, **model_options)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA | case.lora))


def plain_name(name: str) -> str:
    """peft's name of a parameter -> ours."""
    name = name.removeprefix("base_model.model.")
    name = name.replace(".base_layer.", ".").replace(".default.", ".").replace("original_module.", "")
    name = name.replace("modules_to_save.", "").replace("token_adapter.weight", "weight").removesuffix(".default")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def theirs(case: Case, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss sum, gradients) of every document by itself."""
    model = peft_model(case, attn_implementation="sdpa").to(dtype)
    config = config_from_dict(in_both_forms(case.raw)[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.copy_(weight(plain_name(name), tuple(parameter.shape), config))
    total = 0.0
    for document in itertools.chain(*documents(model.config.vocab_size)):
        ids, labels = (torch.from_numpy(x).long() for x in (document.input_ids, document.labels))
        logits = model(input_ids=ids[None]).logits[0, :-1].to(torch.promote_types(dtype, torch.float32))
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
    total.backward()
    named = model.named_parameters()
    return total.item(), {plain_name(name): p.grad for name, p in named if p.requires_grad}


@pytest.fixture
def precise_norm(monkeypatch):
    """RMSNorm of transformers in the dtype of its input."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for family in FAMILIES:
        module = getattr(transformers.models, family)
        modeling = getattr(module, f"modeling_{family}")
        for name in [name for name in vars(modeling) if name.endswith("RMSNorm") and name[0] != "_"]:
            monkeypatch.setattr(getattr(modeling, name), "forward", forward)


def compare(case: Case, dtype: torch.dtype, tolerance: float, tp: int = 1) -> None:
    outcomes = [ours(0, 1, case, dtype)] if tp == 1 else spawn(ours, tp, case, dtype)
    loss, gradients = theirs(case, dtype)
    assert gradients, "nothing is trained"
    assert {name for _, found in outcomes for name in found} == set(gradients)
    for our_loss, ours_by_name in outcomes:
        assert abs(our_loss - loss) <= tolerance * abs(loss)
        for name, (split, gradient) in ours_by_name.items():
            scale = gradients[name].abs().max()
            assert scale > 1e-6, f"{name} has no gradient to compare"
            assert (gradient - split.slice(gradients[name])).abs().max() <= tolerance * scale, name


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": {"rope_theta": 1000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "linear, named type": {"rope_scaling": {"type": "linear", "factor": 3.0, "rope_type": "linear"}},
    "llama3": {"rope_theta": 500.0, "rope_scaling": FAMILIES["llama"]["rope_scaling"]},
    "yarn": {"rope_scaling": YARN},
    "yarn, all fields": {
        "rope_theta": 2000.0,
        "rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7, "truncate": False},
    },
}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}
CASES = {
    **{family: Case(family) for family in FAMILIES},
    **{f"rope {name}": Case("qwen2", ROPES[name]) for name in ROPES},
    **{f"new form, rope {name}": Case("llama", ROPES[name], new_form=True) for name in ROPES},
    "mistral without a window": Case("mistral", {"sliding_window": None}),
    "window of two": Case("mistral", {"sliding_window": 2}),
    "qwen2, windows above": Case("qwen2", WINDOW | {"max_window_layers": 2}),
    "qwen3, layer types": Case("qwen3", WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "tied llama": Case("llama", {"tie_word_embeddings": True}),
    "untied qwen2": Case("qwen2", {"tie_word_embeddings": False}),
    "phi3, no window, grouped queries": Case("phi3", {"sliding_window": None, "num_key_value_heads": 2}),
    "gpt_neox, sequential": Case("gpt_neox", {"use_parallel_residual": False, "hidden_act": "relu"}),
    "gpt_neox, whole heads rotate": Case("gpt_neox", {"rotary_pct": 1.0, "attention_bias": False}),
    "gpt_neox, tied, bias lora_only": Case("gpt_neox", {"tie_word_embeddings": True}, {"bias": "lora_only"}),
    "one KV head": Case("llama", {"num_key_value_heads": 1}),
    "no grouped queries": Case("qwen3", {"num_key_value_heads": 8}),
    "qwen2, bias all": Case("qwen2", lora={"bias": "all", "target_modules": ["q_proj"]}),
    "qwen2, bias lora_only": Case("qwen2", lora={"bias": "lora_only", "target_modules": ["k_proj", "o_proj"]}),
    "llama, bias all": Case("llama", {"attention_bias": True, "mlp_bias": True}, {"bias": "all"}),
    "qwen3, attention bias": Case("qwen3", {"attention_bias": True}, {"bias": "lora_only"}),
    "rslora, patterns": Case(
        "llama",
        lora={
            "use_rslora": True,
            "rank_pattern": {"q_proj": 5, r"layers\.[02]\.mlp\.down_proj": 2},
            "alpha_pattern": {"v_proj": 11, "model.layers.1.self_attn.o_proj": 3},
        },
    ),
    "dora": Case("llama", lora={"use_dora": True}),
    "dora, bias all, k and down": Case(
        "qwen2", lora={"use_dora": True, "bias": "all", "target_modules": ["k_proj", "down_proj"], "use_rslora": True}
    ),
    "dora, fused and parallel": Case("gpt_neox", lora={"use_dora": True, "rank_pattern": {"dense": 2}}),
    "a bias of B": Case("qwen2", lora={"lora_bias": True}),
    "a bias of B where the base has none": Case("llama", lora={"lora_bias": True, "exclude_modules": ["v_proj"]}),
    "all but an expression": Case("qwen3", lora={"exclude_modules": r".*layers\.[12]\.mlp\..*"}),
    "words in full": Case("llama", lora={"modules_to_save": ["embed_tokens", "lm_head"]}),
    "adapters on words": Case("qwen3", lora={"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "rows of tokens, tied": Case("qwen2", lora={"trainable_token_indices": [3, 17, 130], "target_modules": ["v_proj"]}),
    "upper layers, q and v": Case(
        "mistral", lora={"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 3]}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_float64_with_a_precise_norm(name, precise_norm):
    compare(CASES[name], torch.float64, 1e-10)


@pytest.mark.parametrize("name", [*FAMILIES, "rope yarn, all fields", "qwen2, bias all", "window of two"])
def test_float32_as_it_is(name):
    compare(CASES[name], torch.float32, 1e-5)


def test_dora_at_tp4(precise_norm):
    """k and v heads that two ranks hold, row-parallel norms summed over tp."""
    dora = {"use_dora": True, "bias": "all"}
    compare(Case("qwen2", {"num_key_value_heads": 2}, dora), torch.float64, 1e-10, tp=4)


QWEN_1_5B = Case(  # 12 heads, 2 KV heads and biases as they are, all sizes a sixteenth
    "qwen2",
    {
        "hidden_size": 96, "intermediate_size": 560, "num_hidden_layers": 3, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 251, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "tie_word_embeddings": False, "sliding_window": 4096, "use_sliding_window": False,
        "max_window_layers": 2,
    },
    {"bias": "all"},
)  # fmt: skip


def test_the_shape_of_qwen_1_5b_at_tp4(precise_norm):
    compare(QWEN_1_5B, torch.float64, 1e-10, tp=4)


def test_the_shape_of_qwen_1_5b_at_tp4_in_float32():
    compare(QWEN_1_5B, torch.float32, 1e-5, tp=4)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_heads_that_tp_does_not_divide(precise_norm, tp):
    """The heads of SmolLM2-135M: 9, with 3 KV heads."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54, "intermediate_size": 81}
    compare(Case("llama", heads), torch.float64, 1e-10, tp=tp)


# ---- that the comparison notices what all layouts would do wrong alike


MISTAKES = {
    "labels never shifted": ("megalora.data.packing.shift", lambda labels: labels),
    "documents of a row see one another": (
        "megalora.models.blocks.attention.attention",
        lambda q, k, v, bounds, window, *_: _attention(q, k, v, range(0, q.shape[0] + 1, SEQ_LENGTH), window),
    ),
    "a window one too wide": (
        "megalora.models.blocks.attention.attention",
        lambda q, k, v, bounds, window, *_: _attention(q, k, v, bounds, window + 1),
    ),
    "positions do not turn": (
        "megalora.models.blocks.attention.split_rope",
        lambda qkv, cos, sin, *heads: _split_rope(qkv, torch.ones_like(cos), torch.zeros_like(sin), *heads),
    ),
    "the branch is not scaled": (
        "megalora.parallel.group.LinearGroup.refresh",
        lambda group: _put_beside(group, lambda linear: linear.lora_B.weight),
    ),
    "dA without the branch's scale": (
        "megalora.ops.lora_backward.lora_down_weight_grad",
        lambda dz, x, token_index, draw: dz.t() @ x * (LORA["r"] / LORA["lora_alpha"]),
    ),
    "dB without the branch's scale": (
        "megalora.parallel.group_grad.lora_up_weight_grad",
        lambda dy, z, scaling, into: into.add_(dy.t() @ z),
    ),
    "dB of gate and up without the branch's scale": (
        "megalora.ops.lora_backward.lora_up_weight_grad",
        lambda dy, z, scaling, into: into.add_(dy.t() @ z),
    ),
    "no gradient through the branch to the input": (
        "megalora.ops.lora_backward.lora_down_input_grad_",
        lambda dx, dz, A, token_index, draw, out: None if out is None else out.copy_(dx),
    ),
}


def _attention(*args):
    from megalora.ops.attention import attention

    return attention(*args)


def _split_rope(*args):
    from megalora.ops.rope import split_rope

    return split_rope(*args)


_refresh = LinearGroup.refresh


@torch.no_grad()
def _put_beside(group, what):
    """`what` of each adapted linear beside the frozen weights, where s B belongs."""
    _refresh(group)
    for linear, rows, columns in zip(group.linears, group.rows, group.branches, strict=True):
        if linear.lora_B is not None:
            group.matrix.branch(rows, columns).copy_(what(linear))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name, monkeypatch):
    case = CASES["mistral"]
    compare(case, torch.float32, 1e-5)
    target, wrong = MISTAKES[name]
    monkeypatch.setattr(target, wrong)
    with pytest.raises(AssertionError):
        compare(case, torch.float32, 1e-5)


# ---- what is adapted


SELECTIONS = {
    "default": {"target_modules": None},
    "all-linear": {},
    "one name": {"target_modules": ["down_proj"]},
    "names": {"target_modules": ["q_proj", "o_proj", "gate_proj"]},
    "a name with its parent": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "a whole name": {"target_modules": ["model.layers.2.mlp.up_proj", "v_proj"]},
    "an expression": {"target_modules": r".*\.layers\.[13]\.self_attn\.(q|v)_proj"},
    "an expression is of the whole name": {"target_modules": r"model\.layers\.0\..*_proj"},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 3]},
    "one layer": {"target_modules": ["up_proj"], "layers_to_transform": 2},
    "ranks": {"rank_pattern": {"q_proj": 5, "mlp.down_proj": 2, r"layers\.1\..*_proj": 6}},
    "the first pattern that fits": {"rank_pattern": {r".*_proj": 4, "q_proj": 5}},
    "a pattern is the end of a name": {"rank_pattern": {"q_proj|proj|layers.1": 2}},
    "alphas": {"alpha_pattern": {"v_proj": 1, r"layers\.[12]\.mlp\.(up|down)_proj": 40}},
    "rslora": {"use_rslora": True, "r": 5},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 3}},
}


NAMED_AS_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
ANY_NAMES = ("default", "all-linear", "rslora")  # peft has no default for phi3


SELECTED = [
    (family, name)
    for family in FAMILIES
    for name in SELECTIONS
    if family in NAMED_AS_LLAMA or name in ANY_NAMES[family == "phi3" :]
]


@pytest.mark.parametrize(("family", "name"), SELECTED)
def test_the_linears_that_peft_adapts(family, name):
    case = Case(family, lora=SELECTIONS[name])
    theirs = {
        plain_name(name): (module.r["default"], module.scaling["default"])
        for name, module in peft_model(case).named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    config = config_from_dict(case.raw)
    found = resolve_lora(LoraConfig.from_dict(LORA | case.lora), config)
    assert {name: (a.r, a.scaling) for name, a in found.adapters.items()} == theirs


def test_default_targets_are_pefts():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    shared = set(THEIRS) & set(DEFAULT_TARGET_MODULES)
    assert len(shared) >= 32
    for kind in shared:
        theirs = THEIRS[kind]
        if isinstance(theirs, str):  # gemma4's: of the language model alone, as ours are
            theirs = re.fullmatch(r"\.\*language_model\\\.\.\*\\\.\((.*)\)", theirs)[1].split("|")
        assert list(DEFAULT_TARGET_MODULES[kind]) == theirs, kind


# ---- how an adapter begins


@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_initial_adapters_are_drawn_as_pefts(init, factor):
    torch.manual_seed(0)
    size, r = 4000, 16
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(size, size),
        "default",
        config=peft.LoraConfig(init_lora_weights=init, r=r),
        r=r,
        init_lora_weights=init,
    )
    theirs = getattr(layer, factor)["default"].weight.detach()
    mine = initial_factor(f"x.{factor}.weight", tuple(theirs.shape), 5, init, r)
    if factor == "lora_B" and init is not False:
        assert not theirs.any() and not mine.any()
        return
    for p in (0.01, 0.1, 0.5, 0.9, 0.99):
        a, b = (x.flatten().quantile(p) for x in (mine, theirs))
        assert abs(a - b) <= 0.08 * theirs.std(), f"quantile {p}: {a}, in peft {b}"
    if init != "gaussian":  # uniform: the bounds are sharp
        assert abs(mine.max() - theirs.max()) <= 0.002 * theirs.max()
        assert abs(mine.min() - theirs.min()) <= 0.002 * theirs.max()
