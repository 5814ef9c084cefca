"""Qwen1.5-MoE and Qwen2-MoE: experts beside an MLP that all tokens go through, gated by one number a token."""

from megalora.models.families.qwen2 import WINDOW_FIELDS, windows
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
from megalora.models.spec import Attention, Experts, Linear, Mixer, ModelSpec


def read(hf: Fields) -> ModelSpec:
    sparse, dense, count, window = sparse_layers(hf), gated_mlp(hf), hf.num_experts, windows(hf)
    experts = Experts(
        router(hf, "mlp.gate", count, renormalise=bool(hf.norm_topk_prob)),
        count,
        gated_mlp(hf, at="mlp.experts.{expert}", inner=hf.moe_intermediate_size),
        gated_mlp(hf, at="mlp.shared_expert", inner=hf.shared_expert_intermediate_size),
        Linear("mlp.shared_expert_gate", hf.hidden_size, 1),
    )

    def attention(layer: int) -> Attention:
        return grouped_attention(hf, bias=hf.qkv_bias, window=window[layer])

    def mlp(layer: int) -> Mixer:
        return experts if sparse[layer] else dense

    return llama_like(hf, attention, mlp)


FAMILY = Family(
    ("qwen2_moe",),
    read,
    reads=LLAMA_FIELDS
    | WINDOW_FIELDS
    | frozenset(
        """num_experts num_experts_per_tok norm_topk_prob moe_intermediate_size shared_expert_intermediate_size
        decoder_sparse_step mlp_only_layers qkv_bias""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED,
    harmless=ROUTER_HARMLESS,
    files=LLAMA_FILES,
)
