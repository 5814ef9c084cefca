"""Hunyuan 3 (HY-V3): Qwen3's attention, experts chosen by corrected sigmoid scores beside an MLP of all tokens."""

from megalora.models.families.deepseek_v3 import deepseek_like, shared_mlp
from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FIXED,
    ROUTER_FIXED,
    gated_mlp,
    grouped_attention,
    router,
)
from megalora.models.spec import Experts, FileNames, ModelSpec


def read(hf: Fields) -> ModelSpec:
    bias, count = bool(hf.attention_bias), hf.num_experts
    attention = grouped_attention(hf, bias=bias, out_bias=bias, qk_norm=True)
    choice = router(
        hf, "mlp.gate", count, score="sigmoid", renormalise=True, scale=hf.router_scaling_factor, wide=True,
        correction="mlp.e_score_correction_bias",
    )  # fmt: skip
    expert = gated_mlp(hf, at="mlp.experts.{expert}", inner=hf.moe_intermediate_size)
    return deepseek_like(hf, attention, Experts(choice, count, expert, shared_mlp(hf, hf.num_shared_experts)))


_SHARED = tuple(
    (f".mlp.shared_mlp.{name}.weight", f".mlp.shared_experts.{name}.weight")
    for name in ("gate_proj", "up_proj", "down_proj")
)
FAMILY = Family(
    ("hy_v3",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """attention_bias mlp_layer_types num_experts num_shared_experts num_experts_per_tok moe_intermediate_size
        router_scaling_factor""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED | {"mlp_bias": False},
    harmless=frozenset({"enable_moe_fp32_combine"}),  # sums of experts are of float32 or wider always
    theta=11_158_840.0,
    files=FileNames(
        prefix="model.",
        endings=(
            (".mlp.router.gate.weight", ".mlp.gate.weight"),
            (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
            *_SHARED,
        ),
    ),
)
