"""Sizes of the tiny models of tests on a GPU."""

from __future__ import annotations

from oracle import ENCODERS, EXPERTS, FAMILIES, MODERN

# Sizes that the kernels take: rows on 16 bytes, heads of 16 or more.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 264,
}


def sizes(family: str, **more: object) -> dict:
    """Return fields of config.json, beside the family's tiny ones, that the kernels of GPUs take; with `more`."""
    own = {"gpt_neox": {"rotary_pct": 0.5}}
    tiny = (FAMILIES | EXPERTS | ENCODERS | MODERN).get(family, {})
    if "kv_lora_rank" in tiny:
        own[family] = {"num_key_value_heads": 4, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32}
        if "partial_rotary_factor" in tiny.get("rope_parameters", {}):
            own[family]["rope_parameters"] = tiny["rope_parameters"] | {"partial_rotary_factor": 8 / 32}
    layers = SIZES["num_hidden_layers"]
    if "mlp_layer_types" in tiny:
        own[family] = own.get(family, {}) | {"mlp_layer_types": tiny["mlp_layer_types"][:layers]}
    for name in {"layer_types", "layer_rope_theta"} & tiny.keys():
        own[family] = own.get(family, {}) | {name: tiny[name][-layers:]}
    if "global_head_dim" in tiny:
        own[family]["global_head_dim"] = 64
    if "linear_key_head_dim" in tiny:
        own[family] = {"linear_key_head_dim": 16, "linear_value_head_dim": 128}
        own[family] |= {"layer_types": ["linear_attention", "full_attention"]}
    if "attn_layer_indices" in tiny:
        own[family] = {"attn_layer_indices": [1]}
    if "short_mscale" in tiny.get("rope_scaling", {}):  # with a factor for each pair
        own[family] = {"rope_scaling": None}
    if "ssm_state_size" in tiny:  # three layers, of a kind each
        own[family] = {"mamba_head_dim": 16, "ssm_state_size": 16}
    own["granite"] = {"attention_dropout": 0.1}
    own["starcoder2"] = {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}
    fields = SIZES | more | own.get(family, {})
    if family in ("granite", "starcoder2"):
        del fields["head_dim"]  # these have none
    if family in ENCODERS:
        del fields["head_dim"], fields["num_key_value_heads"]
    if "block_ff_dim" in tiny:
        del fields["intermediate_size"]  # which is the same
    return fields
