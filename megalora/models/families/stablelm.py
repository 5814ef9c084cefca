"""StableLM 2 and Zephyr: LayerNorm, a quarter of each head rotates, norms on the heads where the config asks."""

from typing import Any

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    gated_mlp,
    grouped_attention,
    head_dim,
    kv_heads,
    llama_ends,
)
from megalora.models.spec import Layer, ModelSpec, Norm, ParallelResidual, Residual


def read(hf: Fields) -> ModelSpec:
    eps = hf.layer_norm_eps
    norms: dict[str, Any] = {}
    if hf.qk_layernorm:
        norms = {
            f"{name}_norm": Norm(
                f"self_attn.{name}_layernorm.norms", head_dim(hf), eps, "layer", heads=heads, apart=True
            )
            for name, heads in (("q", hf.num_attention_heads), ("k", kv_heads(hf)))
        }
    attention, mlp = grouped_attention(hf, bias=hf.use_qkv_bias, **norms), gated_mlp(hf)

    def norm(name: str) -> Norm:
        return Norm(name, hf.hidden_size, eps, "layer", bias=True)

    def layer(index: int) -> Layer:
        before = norm("input_layernorm")
        dropout = hf.hidden_dropout  # behind the MLP only
        if hf.use_parallel_residual:
            return (ParallelResidual((Residual(attention, before), Residual(mlp, before, dropout=dropout))),)
        return (Residual(attention, before), Residual(mlp, norm("post_attention_layernorm"), dropout=dropout))

    return llama_ends(hf, layer, norm("model.norm"))


FAMILY = Family(
    ("stablelm",),
    read,
    reads=LLAMA_FIELDS
    - {"rms_norm_eps", "head_dim"}
    | {"layer_norm_eps", "qk_layernorm", "use_parallel_residual", "use_qkv_bias", "hidden_dropout"},
    fixed=LLAMA_FIXED,
    partial=0.25,
    files=LLAMA_FILES,
    published=("stablelm-2-1_6b", "stablelm-2-12b"),
)
