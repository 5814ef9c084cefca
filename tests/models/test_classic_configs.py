"""Published configs of the older decoders: read as their makers wrote them, with the parameters that they have."""

import math
import warnings

import pytest
import torch
from classic_configs import CONFIGS
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megalora.errors import UserError
from megalora.models.config import check_layout, config_from_dict
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.pipeline.partition import partition

ODD = ("gpt2-xl", "falcon-7b", "falcon-7b, first form")  # numbers of heads
GPT2, GLM, MPT, OPT = (CONFIGS[name][0] for name in ("gpt2", "chatglm3-6b", "mpt-7b", "opt-1.3b"))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name):
    raw, count = CONFIGS[name]
    assert sum(map(math.prod, config_from_dict(raw).tensors.values())) == count


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_on_the_ranks_of_tp2_pp4(name):
    config = config_from_dict(CONFIGS[name][0])
    if name in ODD:
        with pytest.raises(UserError, match="does not divide num_attention_heads") as raised:
            check_layout(config, 2, 4)
        assert "--uneven_heads true" in raised.value.hint
    check_layout(config, 2, 4, uneven_heads=name in ODD)
    elements: dict[str, int] = {}
    for s, layers in enumerate(partition("uniform", [1] * config.num_hidden_layers, 4)):
        for rank in range(2):
            place = Placement(Axis(rank, (0, 1)), False, torch.bfloat16, "meta")
            splits = named_splits(Stage(config, layers, place, first=s == 0, last=s == 3))
            for parameter, split in splits.items():
                held = math.prod(split.local_shape) if split.dim is not None or rank == 0 else 0
                elements[parameter] = elements.get(parameter, 0) + held
    head = {config.head.weight: math.prod(config.tensors[config.embedding.weight])} if config.head.tied else {}
    wanted = {n: math.prod(shape) for n, shape in config.tensors.items()} | head
    shared = {n for n in wanted if elements[n] > wanted[n]}  # of key/value heads that both ranks read
    assert elements.keys() == wanted.keys() and all(elements[n] >= count for n, count in wanted.items())
    assert all("c_attn" in n or "query_key_value" in n for n in shared), shared


@pytest.mark.parametrize("name", ["gpt2-xl", "santacoder", "gpt-neo-125m", "codegen-6B", "opt-350m", "falcon-11b"])
def test_names_and_shapes_are_those_of_transformers(name):
    raw = CONFIGS[name][0]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[raw["model_type"]](**raw))
    assert config_from_dict(raw).tensors == {n: tuple(p.shape) for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_config_is_read_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from_dict(CONFIGS[name][0])


@pytest.mark.parametrize(
    "raw, said",
    [
        (GLM | {"position_encoding_2d": True}, "ChatGLM-1"),
        (GLM | {"rope_ratio": 50}, "rope_ratio"),
        (GLM | {"multi_query_group_num": 3}, "multi_query_group_num"),
        (GPT2 | {"n_embd": 768, "hidden_size": 1024}, "are one field"),
        (GPT2 | {"activation_function": "swiglu"}, "activation_function"),
        (GPT2 | {"attn_pdrop": 1.5}, "attn_pdrop"),
        (GPT2 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type .* has no rotary positions"),
        (CONFIGS["codegen-6B"][0] | {"rope_theta": 5e5}, "rope_theta = 500000.0, but this model turns by 10000 always"),
        (GPT2 | {"rope_theta": 5e5}, "rope_theta = 500000.0, but this model has no rotary positions"),
        (CONFIGS["codegen-6B"][0] | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type .* no rope fields"),
        (MPT | {"attn_config": {"alibi": False}}, r"attn_config\.alibi"),
        (MPT | {"attn_config": {"qk_gn": True}}, r"attn_config\.qk_gn"),
        (MPT | {"norm_type": "rmsnorm"}, "norm_type"),
        (OPT | {"layerdrop": 0.1}, "layerdrop"),
        (OPT | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        (CONFIGS["btlm-3b-8k"][0] | {"alibi_scaling": {"type": "linear", "train_seq_len": 8192}}, "alibi_scaling"),
        (CONFIGS["falcon-40b"][0] | {"parallel_attn": False}, "parallel_attn"),
        (CONFIGS["bloom"][0] | {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_implemented_is_refused_by_name(raw, said):
    with pytest.raises(UserError, match=said):
        config_from_dict(raw)
