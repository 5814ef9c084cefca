"""MiniMax-M2 and MiniMax-M2.1: experts chosen by corrected sigmoid scores, RMSNorm over all heads of q and k."""

import dataclasses

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    ROUTER_HARMLESS,
    gated_mlp,
    grouped_attention,
    head_dim,
    llama_like,
    norms_over_heads,
    router,
)
from megalora.models.spec import Experts, ModelSpec


def read(hf: Fields) -> ModelSpec:
    at, count, rotates = "block_sparse_moe.", hf.num_local_experts, hf.rotary_dim
    attention = grouped_attention(hf, **norms_over_heads(hf))
    share = hf.rope["partial_rotary_factor"]
    if rotates is not None and int(head_dim(hf) * share) != rotates:
        hf.fail(f"rotary_dim ({rotates}) and partial_rotary_factor ({share}) are one field", "keep one of them")
    if any(kind != 1 for kind in hf.attn_type_list or ()):
        hf.fail("attn_type_list has other kinds of attention than 1", "take a model with full attention in all layers")
    correction = f"{at}e_score_correction_bias"
    choice = router(hf, f"{at}gate", count, score="sigmoid", renormalise=True, correction=correction)
    expert = gated_mlp(hf, at=f"{at}experts.{{expert}}", names=("w1", "w3", "w2"))
    spec = llama_like(hf, lambda layer: attention, Experts(choice, count, expert))
    return dataclasses.replace(spec, predicting=hf.num_mtp_modules or 0)


FAMILY = Family(
    ("minimax_m2",),
    read,
    reads=LLAMA_FIELDS
    | {"num_local_experts", "num_experts_per_tok", "rotary_dim", "attn_type_list", "num_mtp_modules"},
    optional=frozenset({"rotary_dim", "attn_type_list", "num_mtp_modules"}),
    fixed=LLAMA_FIXED
    | ROUTER_FIXED
    | {
        "router_jitter_noise": 0.0, "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True,
        "qk_norm_type": "per_layer", "shared_intermediate_size": 0, "sliding_window": None,
        "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0,
    },
    # There is neither an MLP of all tokens nor a dense layer, and layers that predict further tokens are passed over.
    harmless=ROUTER_HARMLESS | {"shared_moe_mode", "mlp_intermediate_size", "use_mtp", "mtp_transformer_layers"},
    theta=5e6,
    partial=("rotary_dim", "head_dim"),
    files=LLAMA_FILES,
    published=("MiniMax-M2",),
)  # fmt: skip
