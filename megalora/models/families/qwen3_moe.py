"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3's attention, and experts without a shared one."""

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
    router,
    sparse_layers,
)
from megalora.models.spec import Experts, Mixer, ModelSpec


def read(hf: Fields) -> ModelSpec:
    window = hf.sliding_window if hf.use_sliding_window else None
    bias, sparse, dense, count = bool(hf.attention_bias), sparse_layers(hf), gated_mlp(hf), hf.num_experts
    attention = grouped_attention(hf, bias=bias, out_bias=bias, window=window, qk_norm=True)
    expert = gated_mlp(hf, at="mlp.experts.{expert}", inner=hf.moe_intermediate_size)
    experts = Experts(router(hf, "mlp.gate", count, renormalise=bool(hf.norm_topk_prob)), count, expert)

    def mlp(layer: int) -> Mixer:
        return experts if sparse[layer] else dense

    return llama_like(hf, lambda layer: attention, mlp)


FAMILY = Family(
    ("qwen3_moe",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """use_sliding_window sliding_window num_experts num_experts_per_tok norm_topk_prob moe_intermediate_size
        decoder_sparse_step mlp_only_layers attention_bias""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED,
    harmless=ROUTER_HARMLESS | {"max_window_layers"},
    files=LLAMA_FILES,
    published=("Qwen3-30B-A3B",),
)
