"""config.json: both forms read alike, and nothing that would change the numbers passes in silence."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from oracle import EXPERTS, FAMILIES, MODERN, TINY, fields_of

from megalora.errors import UserError
from megalora.models.config import check_layout, check_length, config_from_dict, known_families, read_config, spec_of
from megalora.models.family import Fields
from megalora.models.spec import mixers_of
from megalora.parallel.mesh import Axis
from megalora.parallel.split import cut_heads

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
QWEN2 = LLAMA | {"model_type": "qwen2"}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 16}
MISTRAL = LLAMA | {"model_type": "mistral"}


def is_scaled(raw: dict) -> bool:
    return known_families()[raw["model_type"]].scaled


def without(raw: dict, *names: str) -> dict:
    return {name: value for name, value in raw.items() if name not in names}


# ---- what is read


def test_the_families():
    assert {"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox"} <= set(known_families())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_saved_config_says_is_read_back(model_type, tmp_path):
    """config.json as the installed transformers writes it, against the attributes of its own config object."""
    theirs = transformers.CONFIG_MAPPING[model_type](**without(LLAMA, "model_type"), tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours == read_config(tmp_path / "config.json")
    attention, mlp = mixers_of(ours.stack.layers[0])
    assert (attention.kv_heads, mlp.inner) == (theirs.num_key_value_heads, theirs.intermediate_size)
    assert ours.stack.final_norm.eps == theirs.rms_norm_eps
    for name in without(LLAMA, "rope_theta", "num_key_value_heads", "intermediate_size", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.tie_word_embeddings is True


@pytest.mark.parametrize(
    "old, new",
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({}, {"rope_type": "default"}),
        (
            {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4},
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 5e5,
            },
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
        ),
    ],
    ids=["theta", "nothing", "linear", "llama3", "yarn"],
)
@pytest.mark.parametrize("base", [LLAMA, MISTRAL, QWEN2, QWEN3], ids=lambda raw: raw["model_type"])
def test_old_and_new_form_are_one_config(base, old, new):
    base = without(base, "rope_theta")
    a = config_from_dict(base | old | {"torch_dtype": "bfloat16"})
    b = config_from_dict(base | {"rope_parameters": new, "dtype": "bfloat16"})
    assert a == b
    assert a.dtype == "bfloat16"
    assert a.attention.position.size == a.head_dim


def test_theta_and_scaling_change_the_frequencies():
    found = {
        config_from_dict(LLAMA | change).attention.position.inverse_frequencies
        for change in (
            {},
            {"rope_theta": 1e6},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        )
    }
    assert len(found) == 4
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert config_from_dict(LLAMA | {"rope_scaling": yarn}).attention.position.factor > 1.1
    exact = [10000.0 ** -(i / 4) for i in range(4)]
    assert torch.allclose(
        torch.tensor(config_from_dict(LLAMA).attention.position.inverse_frequencies, dtype=torch.float64),
        torch.tensor(exact, dtype=torch.float64),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "raw, windows",
    [
        (MISTRAL | {"sliding_window": 16}, (16,) * 4),
        (MISTRAL | {"sliding_window": None}, (None,) * 4),
        (LLAMA, (None,) * 4),
        (QWEN2 | {"sliding_window": 16, "use_sliding_window": False}, (None,) * 4),
        (
            QWEN2 | {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 16),
        ),
        (
            QWEN3
            | {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (16, None, 16, None),
        ),
    ],
)
def test_sliding_windows(raw, windows):
    layers = map(mixers_of, config_from_dict(raw).stack.layers)
    assert tuple(attention.window for attention, _ in layers) == windows


def test_what_sets_the_families_apart():
    def biases(raw) -> str:
        linears = (linear for mixer in config_from_dict(raw).mixers for linear in mixer.linears)
        return " ".join(linear.name.rpartition(".")[2].removesuffix("_proj") for linear in linears if linear.bias)

    assert [biases(raw) for raw in (LLAMA, MISTRAL, QWEN2, QWEN3)] == ["", "", "q k v", ""]
    assert biases(LLAMA | {"attention_bias": True}) == biases(QWEN3 | {"attention_bias": True}) == "q k v o"
    assert sorted(biases(LLAMA | {"mlp_bias": True}).split()) == ["down", "gate", "up"]
    norms = [config_from_dict(raw).attention.q_norm for raw in (LLAMA, MISTRAL, QWEN2, QWEN3)]
    assert [norm is not None for norm in norms] == [False, False, False, True]


def test_defaults_of_left_out_fields():
    raw = without(LLAMA, "num_key_value_heads", "rope_theta", "rms_norm_eps")
    config = config_from_dict(raw)
    assert config.attention.kv_heads == 8
    assert config.stack.final_norm.eps == transformers.LlamaConfig().rms_norm_eps
    assert config.rotaries == config_from_dict(LLAMA).rotaries
    assert config.tie_word_embeddings is False
    assert config.head_dim == 8 and config_from_dict(QWEN3).head_dim == 16
    assert config.dtype is None


def test_fields_that_say_nothing_are_passed_over():
    smollm2 = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }
    assert config_from_dict(LLAMA | smollm2).tie_word_embeddings


# ---- what is refused, with the field's name


def named(name: str) -> str:
    return rf"(?s)^my\.json: .*\b{name}\b"


@pytest.mark.parametrize(
    "change, name",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 5}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"num_experts": 8}, "num_experts"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"num_key_value_heads": -1}, "num_key_value_heads"),
        ({"head_dim": 10**12}, "head_dim"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1}}, "factor"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "factor",
        ),
        ({"rope_scaling": {"rope_type": "axial", "factor": 2.0}}, "axial"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "long_factor": [1]}}, "longrope"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "axial", "factor": 2.0, "rope_theta": 1e4}}, "axial"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": ["linear"]}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "architectures"),
        ({"model_type": "gemma7"}, "gemma7"),
        ({"model_type": "llama5"}, "llama5"),
        ({"model_type": None}, "model_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_field_that_would_change_the_numbers_is_refused(change, name):
    with pytest.raises(UserError, match=named(name)) as error:
        config_from_dict(LLAMA | change, "my.json")
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("missing", ["model_type", "hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_missing_field_is_named(missing):
    with pytest.raises(UserError, match=named(missing)):
        config_from_dict(without(LLAMA, missing), "my.json")


def test_layer_types_must_be_as_many_as_layers():
    window = {"use_sliding_window": True, "sliding_window": 4}
    with pytest.raises(UserError, match="layer_types"):
        config_from_dict(QWEN2 | window | {"layer_types": ["full_attention"] * 3}, "my.json")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "factor": 2.0, "high_freq_facto": 4.0},
    ],
    ids=["part of a head", "part of a head, default", "misspelt"],
)
def test_an_unknown_rope_field_is_refused(rope):
    with pytest.raises(UserError, match="|".join(set(rope) - {"rope_type", "factor"})):
        config_from_dict(LLAMA | {"rope_parameters": rope}, "my.json")


@pytest.mark.parametrize("family", [name for name, row in (MODERN | EXPERTS).items() if is_scaled(row)])
def test_a_model_of_scaled_rotations_must_say_how(family):
    """transformers scales them then by numbers of its own, which are those of one of the models."""
    with pytest.raises(UserError, match="^config.json: has no rope_scaling, which this model is made with: take"):
        config_from_dict(without(fields_of(family), "rope_scaling", "rope_parameters"))


@pytest.mark.parametrize(
    "family, rope, said",
    [
        ("ministral3", {"llama_4_scaling_beta": None}, "rope_parameters has no llama_4_scaling_beta"),
        ("ministral3", {"llama_4_scaling_beta": -0.1}, "llama_4_scaling_beta = -0.1 is not valid"),
        ("hunyuan_v1_dense", {"alpha": 0}, "alpha = 0 is not valid"),
        ("hunyuan_v1_dense", {"type": "linear", "rope_type": "linear"}, "alpha = 50.0 with rope_type = 'linear'"),
        ("hunyuan_v1_dense", {"xdrope_section": [1]}, "rope field 'xdrope_section'"),
    ],
)
def test_rope_fields_of_one_family(family, rope, said):
    raw = fields_of(family)
    name = "rope_parameters" if "rope_parameters" in raw else "rope_scaling"
    with pytest.raises(UserError, match=re.escape(said)):
        config_from_dict(raw | {name: raw[name] | rope})


def test_a_type_that_the_installed_transformers_lacks_is_named(monkeypatch):
    known = {name: kind for name, kind in transformers.CONFIG_MAPPING.items() if name == "llama"}
    monkeypatch.setattr("transformers.CONFIG_MAPPING", known)  # by name: transformers may have been imported anew
    assert config_from_dict(LLAMA)
    with pytest.raises(UserError, match=f"'qwen3' is not known to transformers {transformers.__version__}") as error:
        config_from_dict(QWEN3)
    assert error.value.hint == "install a newer one: pip install -U transformers"


# ---- fields that a family must account for


OTHERS = {  # configs as published, sizes aside: what makes each another model than its neighbours
    "granite": {"embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256},
    "olmo2": {"hidden_act": "silu"},
    "phi3": {"resid_pdrop": 0.1},
    "stablelm": {"use_parallel_residual": True, "partial_rotary_factor": 0.25},
    "starcoder2": {"use_bias": True, "norm_epsilon": 1e-5},
    "cohere": {"logit_scale": 0.0625, "use_qk_norm": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
}
SAYS_NOTHING = {"olmo2"}  # olmo2 differs from llama in its code, not in a field: its weights have other names


@pytest.mark.parametrize("name", sorted(OTHERS.keys() - SAYS_NOTHING))
@pytest.mark.parametrize("taken", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_config_under_a_familys_name_is_refused_by_field(name, taken):
    raw = LLAMA | OTHERS[name] | {"model_type": taken}
    with pytest.raises(UserError) as error:
        config_from_dict(raw, "my.json")
    assert any(field in str(error.value) for field in OTHERS[name]), error.value


@pytest.mark.parametrize("name", sorted(OTHERS.keys() - {"phi3", "olmo2"}))
def test_a_family_that_reads_too_little_is_refused(name):
    """Added as llama under another name, it would train with wrong numbers: transformers' class knows the fields."""
    llama = known_families()["llama"]
    raw = LLAMA | OTHERS[name] | {"model_type": name}
    with pytest.raises(UserError, match="is not read|is not implemented"):
        spec_of(replace(llama, types=(name,)), raw)
    with pytest.raises(UserError, match="transformers' default"):  # so too where the file leaves them out
        spec_of(replace(llama, types=("gemma2",)), LLAMA | {"model_type": "gemma2"})


def test_a_family_may_read_what_it_declares_and_no_other():
    llama = known_families()["llama"]
    with pytest.raises(AssertionError, match="mlp_bias"):
        spec_of(replace(llama, reads=llama.reads - {"mlp_bias"}, harmless=frozenset({"mlp_bias"})), LLAMA)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_a_family_declares_it_reads(name):
    """In some config; a field that is declared and never read would be silently ignored."""
    seen = set()

    class Watched(Fields):
        def __getattr__(self, name):
            if not name.startswith("__"):
                seen.add(name)
            return super().__getattr__(name)

    family = known_families()[name]
    read = replace(family, read=lambda hf: family.read(Watched(hf._hf, family, hf._rope, hf._where)))
    windows = {"use_sliding_window": True, "sliding_window": 6} if "use_sliding_window" in family.reads else {}
    kinds = {"layer_types": ["sliding_attention"] * 4} if windows else {}
    for more in ({}, windows, windows | kinds):
        spec_of(read, TINY | FAMILIES[name] | more)
    spec = config_from_dict(TINY | FAMILIES[name] | windows)
    assert windows == {} or spec.attention.window == 6 or "max_window_layers" in family.reads
    missing = family.reads - seen - ({"max_window_layers"} if windows else set())
    assert not missing, missing


# ---- files


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "llama",}', "not json", "\xff"])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json: is not JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("value", [[], "llama", 3, None])
def test_a_file_that_holds_no_object_is_named(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"config\.json: holds a .*, not an object"):
        read_config(tmp_path)


def test_a_missing_folder_or_file_is_named(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=rf"model_path {path}.*(does not exist|cannot be read)") as error:
            read_config(path)
        assert "\n" not in str(error.value)


# ---- check_layout


def test_layouts_that_fit():
    config = config_from_dict(LLAMA | {"intermediate_size": 98})
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4):
            check_layout(config, tp, pp)
    for tp in (3, 5, 6, 7):
        check_layout(config, tp, 1, uneven_heads=True)


@pytest.mark.parametrize(
    "change, tp, pp, uneven, what",
    [
        (
            {},
            3,
            1,
            False,
            r"tensor_parallel_size \(3\) does not divide num_attention_heads \(8\): choose among 1, 2, 4, 8, "
            r"or give --uneven_heads true: the busiest rank then has 3 of 8 heads",
        ),
        ({}, 16, 1, False, r"tensor_parallel_size \(16\) does not divide num_attention_heads \(8\).* 8$"),
        ({}, 16, 1, True, r"tensor_parallel_size \(16\) does not divide num_attention_heads \(8\).* 8$"),
        ({}, 4, 1, True, r"uneven_heads has no effect: tensor_parallel_size \(4\) divides"),
        (
            {"intermediate_size": 3},
            4,
            1,
            False,
            r"tensor_parallel_size \(4\) is more than intermediate_size \(3\)",
        ),
        ({}, 1, 5, False, r"pipeline_parallel_size \(5\) is more than num_hidden_layers \(4\): choose at most 4"),
    ],
)
def test_layouts_that_do_not_fit_say_why(change, tp, pp, uneven, what):
    with pytest.raises(UserError, match=what):
        check_layout(config_from_dict(LLAMA | change), tp, pp, uneven)


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (9, 3), (12, 2), (6, 6), (14, 2), (7, 1), (12, 4)])
def test_heads_are_cut_so_that_each_rank_has_what_it_reads(heads, kv_heads):
    for tp in range(1, heads + 1):
        cuts = [cut_heads(heads, kv_heads, Axis(rank, tuple(range(tp)))) for rank in range(tp)]
        assert [h for cut in cuts for h in range(cut.query.start, cut.query.stop)] == list(range(heads))
        sizes = [cut.query.stop - cut.query.start for cut in cuts]
        assert max(sizes) - min(sizes) <= 1
        for cut in cuts:
            read = {h // (heads // kv_heads) for h in range(cut.query.start, cut.query.stop)}
            assert read == set(range(cut.kv.start, cut.kv.stop)), "no KV head too many or too few"
        counted = [h for cut in cuts for h in range(cut.kv.own_start, cut.kv.own_stop)]
        assert counted == list(range(kv_heads)), "each KV head is counted by one rank"
        held = sum(cut.kv.stop - cut.kv.start for cut in cuts)
        assert {cut.kv.shared for cut in cuts} == {held > kv_heads}


def test_two_forms_of_rope_that_disagree_are_refused():
    """Model cards tell people to add rope_scaling; where rope_parameters is there already, one of them is not read."""
    new = {"rope_type": "default", "rope_theta": 5e5}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(UserError, match="rope_parameters = .* and rope_scaling = .* say different things"):
        config_from_dict(LLAMA | {"rope_parameters": new, "rope_scaling": yarn})
    both = {"rope_parameters": yarn | {"rope_theta": 5e5}, "rope_scaling": yarn | {"type": "yarn"}}
    one = without(LLAMA, "rope_theta") | both
    assert config_from_dict(one) == config_from_dict(LLAMA | {"rope_theta": 5e5, "rope_scaling": yarn})


_LAYERS = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}


@pytest.mark.parametrize(
    "family, change, said",
    [
        ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
        ("gpt_neox", {"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}}, r"rope_parameters\."),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta = 10000.0 and rope_par"),
        ("llama", {"rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e5}}, r"rope_scaling\.rope_theta = 500000.0"),
        ("gemma3_text", {"rope_theta": 1e4, "rope_parameters": _LAYERS}, "rope_theta = 10000.0"),
        ("gemma3_text", {"rope_local_base_freq": 2e4, "rope_parameters": _LAYERS}, "rope_local_base_freq = 20000.0"),
        ("gemma3_text", {"rope_parameters": _LAYERS | {"rope_theta": 7.0}}, "'rope_theta' beside the types of layers"),
        ("gemma3_text", {"rope_parameters": _LAYERS | {"chunked_attention": {}}}, "'chunked_attention' beside"),
    ],
)
def test_two_names_of_one_rope_field_that_disagree_are_refused(family, change, said):
    dropped = ("rope_theta", "rope_scaling", "rotary_pct", "rope_local_base_freq", "rope_parameters")
    plain = {name: value for name, value in fields_of(family).items() if name not in dropped}
    with pytest.raises(UserError, match=said):
        config_from_dict(plain | change)


def test_names_of_one_rope_field_that_agree_are_one():
    plain = without(fields_of("gpt_neox"), "rotary_pct")
    twice = {"rotary_pct": 0.67, "partial_rotary_factor": 0.67, "rope_parameters": {"partial_rotary_factor": 0.67}}
    assert config_from_dict(plain | twice) == config_from_dict(plain | {"rotary_pct": 0.67})


@pytest.mark.parametrize(
    "family, field",
    [
        ("gemma", "hidden_act"), ("gemma2", "hidden_activation"), ("nemotron", "hidden_act"),
        ("starcoder2", "hidden_act"), ("phi", "hidden_act"), ("gpt2", "activation_function"),
    ],
)  # fmt: skip
def test_an_activation_that_is_not_implemented_is_named(family, field):
    with pytest.raises(UserError, match=f"{field} = 'prelu' is not implemented"):
        config_from_dict(fields_of(family) | {field: "prelu"})


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe"])
def test_a_kind_of_layer_that_is_not_implemented_is_named(family):
    fields = fields_of(family)
    kinds = (["full_attention", "chunked_attention"] * 2)[: fields["num_hidden_layers"]]
    fields |= {"use_sliding_window": True, "sliding_window": 5, "layer_types": kinds}
    with pytest.raises(UserError, match="layer_types has 'chunked_attention'"):
        config_from_dict(fields)


@pytest.mark.parametrize(
    "fields, longest",
    [
        ({}, 128),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 512),
        ({"dual_chunk_attention_config": {"chunk_size": 16, "original_max_position_embeddings": 64}}, 64),
    ],
)
def test_how_long_a_document_may_be(fields, longest):
    """Scaled rotations reach original * factor; beyond, rotations go on and a line says so."""
    spec = config_from_dict(LLAMA | fields)
    assert check_length(spec, longest) is None
    assert f"more than the {longest} tokens" in check_length(spec, longest + 1)


def test_dynamic_frequencies_are_plain_ones_up_to_the_models_length():
    """Beyond, they would depend on the length of the text."""
    plain = config_from_dict(LLAMA)
    spec = config_from_dict(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert [r.inverse_frequencies for r in spec.rotaries] == [r.inverse_frequencies for r in plain.rotaries]
    assert check_length(spec, 128) is None
    with pytest.raises(UserError, match=r"seq_length \(129\).*dynamic") as raised:
        check_length(spec, 129)
    assert "yarn" in raised.value.hint


def test_what_transformers_does_not_read_of_a_rope_is_said():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attn_factor": 0.88}
    with pytest.raises(UserError, match="'attn_factor' is not one that transformers reads.*rename it to attention_fac"):
        config_from_dict(QWEN3 | {"rope_scaling": scaling})


def test_slices_of_a_product_are_no_other_numbers():
    assert config_from_dict(LLAMA | {"pretraining_tp": 4}) == config_from_dict(LLAMA)
