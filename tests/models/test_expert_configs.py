"""Published models of experts: their config.json is read, and means as many parameters as in transformers."""

import math
import re

import pytest
import torch
import transformers
from expert_configs import CONFIGS
from oracle import fields_of
from variants import class_of

from megalora.errors import UserError
from megalora.models.config import check_layout, config_from_dict


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_have_the_parameters_of_transformers(name):
    raw = dict(CONFIGS[name])
    spec, kind = config_from_dict(raw), raw.pop("model_type")
    raw.pop("quantization_config", None)
    check_layout(spec, 4, 4)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[class_of(kind)](**raw))
    corrections = (
        b.numel() for n, b in theirs.named_buffers() if n.endswith(("e_score_correction_bias", "expert_bias"))
    )
    expected = sum(p.numel() for p in theirs.parameters()) + sum(corrections)
    assert sum(map(math.prod, spec.tensors.values())) == expected


GEMMA4 = "gemma4_text, experts"


@pytest.mark.parametrize(
    "family, fields, said",
    [
        ("kimi_k2", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not implemented"),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "first_k_dense_replace (2) is not what mlp_layer_types says"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must say dense or sparse for each of 3"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ("minimax_m2", {"partial_rotary_factor": 1.0}, "rotary_dim (4) and partial_rotary_factor (1.0) are one field"),
        ("minimax_m2", {"head_dim": None}, "rotary_dim without head_dim"),
        ("minimax_m2", {"rotary_dim": 0}, "rotary_dim = 0 is not valid"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list has other kinds of attention"),
        ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size = 8 is not implemented"),
        ("dots1", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not implemented"),
        ("solar_open", {"first_k_dense_replace": 1}, "first_k_dense_replace = 1 is not implemented"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias = True is not implemented"),
        ("ernie4_5_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok (7) is more than the number of experts (6)"),
        ("granitemoe", {"residual_multiplier": 0.0}, "residual_multiplier = 0.0 is not valid"),
        ("granitemoe_swa", {"layer_rope_theta": [1e4]}, "layer_rope_theta has 1 entries for 3 layers"),
        ("exaone_moe", {"n_group": 4}, "n_group (4) must divide the number of experts (6)"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 2, 1]}, "moe_topk differs between layers"),
        ("hunyuan_v1_moe", {"num_shared_expert": 2}, "num_shared_expert = 2 are not implemented"),
        ("hunyuan_v1_moe", {"moe_topk": 6}, "num_experts_per_tok (6) is more than the number of experts (5)"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok = 3 is not implemented"),
        ("phimoe", {"router_jitter_noise": -1.0}, "router_jitter_noise = -1.0 is not valid"),
        (GEMMA4, {"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input = 8 is not implemented"),
        (GEMMA4, {"num_kv_shared_layers": 1}, "num_kv_shared_layers = 1 is not implemented"),
        (GEMMA4, {"use_bidirectional_attention": "all"}, "is_causal = False is not implemented"),
        (GEMMA4, {"hidden_activation": "relu"}, "hidden_activation = 'relu' is not implemented for experts"),
        (GEMMA4, {"num_global_key_value_heads": 3}, "layer 2 has 3 key/value heads of 10 features for 8 heads"),
        (GEMMA4, {"per_layer_config": {"2": {"sliding_window": 9}}}, "per_layer_config says {'sliding_window': 9}"),
        (GEMMA4, {"per_layer_config": {"7": {"head_dim": 8}}}, "per_layer_config says {'head_dim': 8} of layer '7'"),
        ("afmoe", {"route_norm": False}, "route_norm = False is not implemented"),
        ("cohere2_moe", {"expert_selection_fn": "relu"}, "expert_selection_fn = 'relu' is not implemented"),
        ("cohere2_moe", {"shared_expert_combination_strategy": "max"}, "strategy = 'max' is not implemented"),
        ("hy_v3", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types must say dense or sparse for each of 3 layers"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not implemented"),
        ("qwen3_next", {"linear_num_value_heads": 6}, "linear_num_value_heads (6) is not a multiple of"),
        ("qwen3_next", {"linear_num_key_heads": 0}, "linear_num_key_heads = 0 is not valid"),
        ("qwen3_next", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim = 0 is not valid"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 3}, "linear_attention alone, which is not implemented"),
        ("qwen3_next", {"layer_types": ["full_attention", "linear_attention"] * 2}, "(3) must be equal to"),
        (
            "qwen3_next",
            {"layer_types": ["full_attention", "linear_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention', which is not implemented",
        ),
        (
            "qwen3_next",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "layer_types is not what full_attention_interval (2) says",
        ),
        ("qwen3_5_moe_text", {"attn_output_gate": False}, "attn_output_gate = False is not implemented"),
    ],
)
def test_fields_that_contradict_or_ask_for_more_are_refused(family, fields, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config_from_dict(fields_of(family, **fields))


def test_a_share_of_a_head_is_told_by_either_field():
    """As transformers saves it: beside rotary_dim, in rope_parameters too."""
    own = config_from_dict(fields_of("minimax_m2"))
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.4}
    assert own.rotaries[0].size == 4
    for fields in ({"rope_parameters": rope}, {"rope_parameters": rope, "rotary_dim": None}):
        assert config_from_dict(fields_of("minimax_m2", **fields)).rotaries == own.rotaries
    assert config_from_dict(fields_of("minimax_m2", rotary_dim=None)).rotaries[0].size == 10


def test_layers_with_sizes_of_their_own_are_told_in_either_form():
    """As published, by fields of full attention, and as transformers saves them, layer by layer."""
    raw = fields_of(GEMMA4)
    kind = transformers.CONFIG_MAPPING["gemma4_text"]
    saved = kind(**{name: value for name, value in raw.items() if name != "model_type"}).to_dict()
    assert "global_head_dim" not in saved and saved["per_layer_config"]
    own, again = config_from_dict(raw), config_from_dict(saved)
    assert again.stack == own.stack
    assert [layer[0].mixer.head_dim for layer in own.stack.layers] == [6, 6, 10]
