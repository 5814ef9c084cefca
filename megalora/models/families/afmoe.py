"""Arcee Trinity (AFMoE): attention with a gate, rotations where windows slide, norms before and behind each block."""

from megalora.models.families.deepseek_v3 import shared_mlp
from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    gated_mlp,
    grouped_attention,
    head_dim,
    layer_windows,
    llama_ends,
    rms,
    router,
    scaled_ends,
)
from megalora.models.spec import Experts, Layer, Linear, ModelSpec, Norm, Residual


def read(hf: Fields) -> ModelSpec:
    windows, bias, count, size = layer_windows(hf), bool(hf.attention_bias), hf.num_experts, hf.hidden_size
    gate = Linear("self_attn.gate_proj", size, hf.num_attention_heads * head_dim(hf))
    q_norm, k_norm = (rms(hf, f"self_attn.{name}_norm", head_dim(hf), precise=True) for name in "qk")
    choice = router(
        hf, "mlp.router.gate", count, score="sigmoid", renormalise=True, scale=hf.route_scale,
        correction="mlp.expert_bias",
    )  # fmt: skip
    expert = gated_mlp(hf, at="mlp.experts.{expert}", inner=hf.moe_intermediate_size)
    dense, experts = gated_mlp(hf), Experts(choice, count, expert, shared_mlp(hf, hf.num_shared_experts))

    def norm(name: str) -> Norm:
        return rms(hf, name, precise=True)

    def layer(index: int) -> Layer:
        attention = grouped_attention(
            hf, bias=bias, out_bias=bias, window=windows[index], rotates=windows[index] is not None, gate=gate,
            q_norm=q_norm, k_norm=k_norm,
        )  # fmt: skip
        mlp = dense if index < hf.num_dense_layers else experts
        return (
            Residual(attention, norm("input_layernorm"), norm("post_attention_layernorm")),
            Residual(mlp, norm("pre_mlp_layernorm"), norm("post_mlp_layernorm")),
        )

    return scaled_ends(llama_ends(hf, layer, norm("model.norm")), embedding=size**0.5 if hf.mup_enabled else 1.0)


FAMILY = Family(
    ("afmoe",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """attention_bias layer_types sliding_window num_experts num_experts_per_tok num_shared_experts num_dense_layers
        moe_intermediate_size route_scale mup_enabled""".split()
    ),
    fixed=LLAMA_FIXED
    | ROUTER_FIXED
    | {
        "score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1, "num_expert_groups": 1,
        "num_limited_groups": 1,
    },  # fmt: skip
    # layer_types says which layers slide; the rest is of another loss, and of another way to compute the same.
    harmless=frozenset({"global_attn_every_n_layers", "load_balance_coeff", "use_grouped_mm"}),
    files=LLAMA_FILES,
    published=("Trinity-Mini",),
)
