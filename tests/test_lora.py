"""lora_config.json: every field is honoured or refused by name. (What peft selects: test_field_parity.py.)"""

import json
import math

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists

from megalora.adapters.config import HEADS, LoraConfig
from megalora.adapters.lora import Adapter, initial_factor
from megalora.adapters.targets import DEFAULT_TARGET_MODULES
from megalora.errors import UserError

LINEARS = {
    f"model.layers.{layer}.{part}": layer
    for layer in range(4)
    for part in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    )
}
REFERENCE = {  # the lora_config.json that the reference's documentation prints
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 64,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL LM",
}


def resolved(model_type: str = "llama", **fields) -> dict[str, Adapter]:
    return dict(LoraConfig.from_dict(fields).resolve(model_type, LINEARS).adapters)


# ---- honoured


def test_the_reference_config():
    config = LoraConfig.from_dict(REFERENCE)
    assert config.task_type == "CAUSAL_LM"
    adapters = config.resolve("qwen2", LINEARS).adapters
    assert set(adapters) == {n for n in LINEARS if n.endswith(("q_proj", "v_proj"))}
    assert set(adapters.values()) == {Adapter(64, 0.25, 0.05)}


def test_defaults_are_pefts():
    ours, theirs = LoraConfig.from_dict({}), peft.LoraConfig()
    assert (ours.r, ours.lora_alpha, ours.lora_dropout) == (theirs.r, theirs.lora_alpha, theirs.lora_dropout)
    assert (ours.bias, ours.use_rslora, ours.init_lora_weights) == ("none", False, True)
    assert ours.bias == theirs.bias and ours.use_rslora == theirs.use_rslora
    assert ours.target_modules is None and ours.layers_to_transform is None


@pytest.mark.parametrize(
    "fields, adapter",
    [
        ({"r": 4, "lora_alpha": 6}, Adapter(4, 1.5, 0.0)),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, Adapter(4, 3.0, 0.0)),
        ({"r": 4, "lora_alpha": 6, "lora_dropout": 0.25}, Adapter(4, 1.5, 0.25)),
        ({"rank_pattern": {"q_proj": 2}, "lora_alpha": 6}, Adapter(2, 3.0, 0.0)),
        ({"r": 4, "alpha_pattern": {"q_proj": 2}}, Adapter(4, 0.5, 0.0)),
        ({"r": 4, "alpha_pattern": {"q_proj": 2}, "rank_pattern": {r"layers\.0\..*": 1}}, Adapter(1, 2.0, 0.0)),
        ({"rank_pattern": {"v_proj": 2}}, Adapter(8, 1.0, 0.0)),
    ],
)
def test_rank_and_scale(fields, adapter):
    assert resolved(**fields)["model.layers.0.self_attn.q_proj"] == adapter


@pytest.mark.parametrize(
    "bias, adapted, other", [("none", False, False), ("all", True, True), ("lora_only", True, False)]
)
def test_which_biases_are_trained(bias, adapted, other):
    config = LoraConfig.from_dict({"bias": bias, "target_modules": ["q_proj"]}).resolve("qwen2", LINEARS)
    assert config.trains_bias("model.layers.1.self_attn.q_proj") is adapted
    assert config.trains_bias("model.layers.1.self_attn.k_proj") is other


def test_layers_to_transform():
    assert {n.split(".")[2] for n in resolved(layers_to_transform=[1, 3])} == {"1", "3"}
    assert resolved(layers_to_transform=2) == resolved(layers_to_transform=[2, 2])
    assert {n.split(".")[2] for n in resolved(layers_to_transform=0)} == {"0"}


def test_a_full_name_stands_for_itself_as_in_peft():
    exactly = "model.layers.1.mlp.down_proj"
    names = resolved(target_modules=["q_proj", exactly], layers_to_transform=[0, 2])
    assert {n for n in names if not n.endswith("q_proj")} == {exactly} and len(names) == 3


def test_a_pattern_of_what_is_not_adapted_does_no_harm():
    assert resolved(target_modules=["v_proj"], rank_pattern={"q_proj": 2}) == resolved(target_modules=["v_proj"])


def test_an_adapter_name_is_matched_at_dots_only():
    with pytest.raises(UserError, match="'proj', which is no linear"):
        resolved(target_modules=["proj"])
    with pytest.raises(UserError, match="matches no linear"):
        resolved(target_modules="q_proj")  # an expression is of the whole name
    assert len(resolved(target_modules=r".*\.q_proj")) == 4


# ---- the defaults by model_type


def test_the_32_model_types_of_the_reference():
    names = """t5 mt5 bart gpt2 bloom blip-2 opt gptj gpt_neox gpt_neo bert roberta xlm-roberta electra deberta-v2
    deberta layoutlm llama chatglm gpt_bigcode mpt RefinedWebModel RefinedWeb falcon btlm codegen mistral mixtral
    stablelm phi gemma qwen2""".split()
    assert len(names) == 32
    for name in names:
        wanted = DEFAULT_TARGET_MODULES[name]
        config = LoraConfig.from_dict({})
        found = config.resolve(name, {f"model.layers.0.{target}": 0 for target in (*wanted, "other")})
        assert set(found.adapters) == {f"model.layers.0.{target}" for target in wanted}


def test_a_model_type_without_default_asks_for_names():
    with pytest.raises(UserError, match="no default target_modules for model_type 'gpt5': name them, or all"):
        resolved("gpt5")


# ---- refused


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0}, {"r": -1}, {"r": 1.5}, {"r": "8"}, {"r": True}, {"r": None},
        {"lora_alpha": 0}, {"lora_alpha": "16"}, {"lora_alpha": None},
        {"lora_dropout": 1}, {"lora_dropout": -0.1}, {"lora_dropout": "0.1"}, {"lora_dropout": True},
        {"target_modules": []}, {"target_modules": [1]}, {"target_modules": 3}, {"target_modules": "(q_proj"},
        {"bias": "some"}, {"bias": True}, {"bias": None},
        {"use_dora": "yes"}, {"lora_bias": 1}, {"exclude_modules": "(q_proj"}, {"exclude_modules": [1]},
        {"init_lora_weights": "corda"}, {"init_lora_weights": "pissa_niter_4"},
        {"use_rslora": "yes"}, {"use_rslora": 1}, {"inference_mode": "no"},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"},
        {"init_lora_weights": "eva"}, {"init_lora_weights": None},
        {"rank_pattern": {"q_proj": 0}}, {"rank_pattern": {"q_proj": 1.5}}, {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"q_proj": -1}}, {"alpha_pattern": {"q_proj": "1"}},
        {"layers_to_transform": []}, {"layers_to_transform": [-1]}, {"layers_to_transform": ["0"]},
        {"layers_to_transform": [True]}, {"layers_to_transform": "all"},
        {"target_parameters": "w"}, {"target_parameters": [1]},
        {"task_type": "FEATURE_EXTRACTION"}, {"task_type": "CAUSALLM"},
        {"peft_type": "IA3"},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(fields):
    (name,) = fields
    with pytest.raises(UserError, match=rf"^my\.json: .*{name}") as error:
        LoraConfig.from_dict(fields, "my.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_replication": [[0, 4]]}, {"megatron_config": {"a": 1}},
        {"loftq_config": {"bits": 4}},
        {"eva_config": {"rho": 2}}, {"corda_config": {}}, {"use_qalora": True}, {"arrow_config": {"a": 1}},
        {"alora_invocation_tokens": [1]}, {"lora_aplha": 16}, {"dropout": 0.1}, {"velora_config": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_is_not_honoured_is_refused_by_name(fields):
    (name,) = fields
    with pytest.raises(UserError, match=rf"^my\.json: .*{name}"):
        LoraConfig.from_dict(fields, "my.json")


def test_exclusions_are_pefts():
    """Names, or an expression over the whole name."""
    names = set(resolved(target_modules="all-linear"))
    for excluded in (["q_proj", "layers.1.mlp.down_proj"], r".*layers\.[02]\..*", []):
        found = set(resolved(target_modules="all-linear", exclude_modules=excluded))
        config = peft.LoraConfig(target_modules=sorted(names), exclude_modules=excluded)
        assert found == {name for name in names if check_target_module_exists(config, name) is True}


def test_an_orthogonal_start_is_nothing_of_two_factors_that_are_something():
    """As peft's: the span of B is orthogonal to that of A, B A = 0."""
    a, b = (
        initial_factor(f"x.q_proj.lora_{f}.weight", shape, 3, "orthogonal", 6)
        for f, shape in (("A", (6, 40)), ("B", (24, 6)))
    )
    assert (b @ a).abs().max() < 1e-6 and a.norm() > 0.1 and b.norm() > 0.1
    other = initial_factor("x.k_proj.lora_A.weight", (6, 40), 3, "orthogonal", 6)
    assert not (other == a).all()
    theirs = peft.tuners.lora.Linear(torch.nn.Linear(400, 300), "one", r=6, config=peft.LoraConfig(r=6), lora_alpha=6)
    theirs.orthogonal_init("one")
    ours = initial_factor("y.lora_A.weight", (6, 400), 3, "orthogonal", 6)
    assert abs(ours.norm() / theirs.lora_A["one"].weight.norm() - 1) < 0.1


def test_how_a_trained_adapter_began():
    """It says nothing of the numbers, unless the start has changed the base."""
    assert LoraConfig.from_dict({"init_lora_weights": "eva"}, trained=True) == LoraConfig()
    assert LoraConfig.from_dict({"init_lora_weights": "orthogonal"}, trained=True).init_lora_weights == "orthogonal"
    for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq"):
        with pytest.raises(UserError, match=f"'{init}': the adapter is relative to a base that its start has changed"):
            LoraConfig.from_dict({"init_lora_weights": init}, trained=True)
    with pytest.raises(UserError, match="use_qalora = True is not implemented: the adapter cannot be used"):
        LoraConfig.from_dict({"use_qalora": True}, trained=True)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"init_lora_weights": "orthogonal", "r": 5}, "needs even ranks, and 5 is odd"),
        ({"lora_bias": True, "use_dora": True}, "goes with neither use_dora nor"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "goes with neither use_dora nor"),
    ],
)
def test_what_does_not_go_together(fields, said):
    with pytest.raises(UserError, match=said):
        LoraConfig.from_dict(fields)


def test_layers_pattern_is_honoured_or_refused():
    with pytest.raises(UserError, match="layers_pattern"):
        LoraConfig.from_dict({"layers_pattern": "blocks", "layers_to_transform": [0]}).resolve("llama", LINEARS)


def test_what_peft_itself_writes_is_read(tmp_path):
    theirs = peft.LoraConfig(
        r=5, lora_alpha=10, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 2}, lora_dropout=0.1,
        layers_to_transform=[0, 2], task_type="CAUSAL_LM", use_rslora=True, bias="lora_only",
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    config = LoraConfig.from_json(tmp_path / "adapter_config.json")
    assert set(config.target_modules) == theirs.target_modules
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (5, 10, 0.1, "lora_only")
    assert (config.use_rslora, config.rank_pattern, config.layers_to_transform) == (True, {"o_proj": 2}, (0, 2))
    assert config.inference_mode == theirs.inference_mode


# ---- what does not fit the model


def test_names_that_match_nothing():
    with pytest.raises(UserError, match="target_modules names 'query', .* choose among down_proj, gate_proj"):
        resolved(target_modules=["q_proj", "query"])
    with pytest.raises(UserError, match="matches no linear"):
        resolved(target_modules=r".*\.query")
    with pytest.raises(UserError, match="layers_to_transform names layer 4, but the model has layers 0 to 3"):
        resolved(layers_to_transform=[0, 4])
    with pytest.raises(UserError, match="lm_head"):
        resolved(target_modules=["q_proj", "lm_head"])


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused(name):
    with pytest.raises(UserError, match=f"{name} names 'proj'"):
        resolved(**{name: {"proj": 2}})


ENDS = ("lm_head", "model.embed_tokens")


def test_embedding_and_head_are_named_like_any_linear():
    """As peft: by names and expressions, not by all-linear; layers_to_transform leaves them out."""

    def adapted(**fields) -> set[str]:
        return set(LoraConfig.from_dict(fields).resolve("llama", LINEARS, ENDS, 100).adapters) & set(ENDS)

    assert adapted(target_modules=["q_proj", "lm_head", "embed_tokens"]) == set(ENDS)
    assert adapted(target_modules=r".*\.q_proj|lm_head") == {"lm_head"}
    assert adapted(target_modules="all-linear") == set()
    assert adapted(target_modules=["q_proj", "embed_tokens"], layers_to_transform=[0]) == set()
    saved = LoraConfig.from_dict({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]})
    saved = saved.resolve("llama", LINEARS, ENDS, 100)
    assert saved.saved == {"lm_head"} and "lm_head" not in saved.adapters
    tokens = LoraConfig.from_dict({"trainable_token_indices": {"lm_head": [3, 1]}}).resolve("llama", LINEARS, ENDS, 9)
    assert tokens.words("lm_head").tokens == (3, 1) and not tokens.words("model.embed_tokens").trains


def test_a_classifier_may_train_its_embedding_beside_its_head():
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["score", "embed_tokens"], "target_modules": ["q_proj"]}
    config = LoraConfig.from_dict(fields)
    assert config.modules_to_save == ("embed_tokens",)
    assert config.resolve("llama", LINEARS, ENDS[1:], 100).saved == {"model.embed_tokens"}
    written = config.to_dict()
    assert written["modules_to_save"] == ["classifier", "score", "embed_tokens"]
    assert LoraConfig.from_dict(written) == config
    assert LoraConfig.from_dict(fields | {"modules_to_save": ["score"]}).to_dict()["modules_to_save"] == [*HEADS]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"modules_to_save": ["q_proj"]}, "modules_to_save names 'q_proj': only lm_head, embed_tokens"),
        ({"trainable_token_indices": [100]}, "names token 100, but the model's vocab_size is 100"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "names 'q_proj', which has no tokens"),
        ({"trainable_token_indices": [1, 1]}, "give a list of different token ids"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "train it in one of these ways"),
        ({"target_modules": ["lm_head"], "use_dora": True}, "use_dora = true is not implemented for lm_head"),
        ({"target_modules": ["lm_head"], "lora_bias": True}, "lora_bias = true is not implemented for lm_head"),
    ],
)
def test_what_cannot_be_trained_of_embedding_and_head(fields, said):
    with pytest.raises(UserError, match=said):
        LoraConfig.from_dict(fields).resolve("llama", LINEARS, ENDS, 100)


def test_an_expression_that_matches_a_classifiers_head_is_refused():
    with pytest.raises(UserError, match="matches score, which cannot carry an adapter"):
        LoraConfig.from_dict({"target_modules": r".*\.q_proj|score"}).resolve("llama", LINEARS, (), 0, ("score",))


# ---- files


@pytest.mark.parametrize("text", ["", "{", '{"r": 8,}', "r: 8", "\xff"])
def test_a_broken_file_is_named(tmp_path, text):
    file = tmp_path / "lora_config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"lora_config .*lora_config\.json: is not JSON"):
        LoraConfig.from_json(file)


def test_a_file_without_an_object_and_a_missing_one(tmp_path):
    file = tmp_path / "lora_config.json"
    with pytest.raises(UserError, match="cannot be read"):
        LoraConfig.from_json(file)
    file.write_text("[1]")
    with pytest.raises(UserError, match="holds a list, not an object"):
        LoraConfig.from_json(file)


FULL = {
    "r": 4,
    "lora_alpha": 7.5,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "all",
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"v_proj": 3.0},
    "layers_to_transform": [0, 2],
    "init_lora_weights": "gaussian",
    "inference_mode": True,
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        FULL,
        {"target_modules": "all-linear"},
        {"target_modules": r".*q_proj"},
        {"init_lora_weights": False},
        REFERENCE,
    ],
)
def test_to_dict_reads_back_as_the_same_config(fields, tmp_path):
    config = LoraConfig.from_dict(fields)
    assert LoraConfig.from_dict(config.to_dict()) == config
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict()))
    assert LoraConfig.from_json(tmp_path / "adapter_config.json") == config
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    assert theirs.peft_type == "LORA" and theirs.task_type == "CAUSAL_LM"
    for name in FULL:
        ours = getattr(config, name)
        if isinstance(ours, tuple):
            assert sorted(getattr(theirs, name)) == sorted(ours)
        else:
            assert getattr(theirs, name) == ours, name


# ---- how an adapter begins


def test_an_initial_adapter_depends_on_seed_and_name_alone():
    a = initial_factor("x.lora_A.weight", (4, 100), 1, True, 4)
    assert a.equal(initial_factor("x.lora_A.weight", (4, 100), 1, True, 4))
    others = [
        initial_factor("y.lora_A.weight", (4, 100), 1, True, 4),
        initial_factor("x.lora_A.weight", (4, 100), 2, True, 4),
        initial_factor("x.lora_A.weight", (4, 100), 1, "gaussian", 4),
    ]
    assert not any(a.equal(other) for other in others)
    assert a.abs().max() <= 1 / math.sqrt(100)
    assert a.abs().max() > 0.95 / math.sqrt(100), "the global fan-in bounds it, not that of a slice"
