"""OLMoE: experts in each layer, RMSNorm over all heads of q and k together."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    ROUTER_HARMLESS,
    gated_mlp,
    grouped_attention,
    llama_like,
    norms_over_heads,
    router,
)
from megalora.models.spec import Experts, ModelSpec


def read(hf: Fields) -> ModelSpec:
    bias, count = bool(hf.attention_bias), hf.num_experts
    attention = grouped_attention(hf, bias=bias, out_bias=bias, **norms_over_heads(hf))
    choice = router(hf, "mlp.gate", count, renormalise=bool(hf.norm_topk_prob))
    experts = Experts(choice, count, gated_mlp(hf, at="mlp.experts.{expert}"))
    return llama_like(hf, lambda layer: attention, experts)


FAMILY = Family(
    ("olmoe",),
    read,
    reads=LLAMA_FIELDS - {"head_dim"} | {"attention_bias", "num_experts", "num_experts_per_tok", "norm_topk_prob"},
    fixed=LLAMA_FIXED | ROUTER_FIXED | {"clip_qkv": None},
    harmless=ROUTER_HARMLESS,
    files=LLAMA_FILES,
    published=("OLMoE-1B-7B-0924",),
)
