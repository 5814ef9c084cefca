"""Command R and Aya: one LayerNorm before attention and MLP, side by side; neighbours rotate; logits are scaled."""

from collections.abc import Callable
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
    scaled_ends,
)
from megalora.models.spec import Attention, Layer, ModelSpec, Norm, ParallelResidual, Residual


def decoder_of(hf: Fields, attention: Callable[[int], Attention]) -> ModelSpec:
    """Return a decoder of Cohere's layers around the attention of each."""
    mlp = gated_mlp(hf)

    def norm(name: str) -> Norm:
        return Norm(name, hf.hidden_size, hf.layer_norm_eps, "layer")

    def layer(index: int) -> Layer:
        before = norm("input_layernorm")
        return (ParallelResidual((Residual(attention(index), before), Residual(mlp, before))),)

    return scaled_ends(llama_ends(hf, layer, norm("model.norm")), logits=hf.logit_scale)


def read(hf: Fields) -> ModelSpec:
    norms: dict[str, Any] = {}
    bias = hf.attention_bias
    if hf.use_qk_norm:
        norms = {
            f"{name}_norm": Norm(f"self_attn.{name}_norm", head_dim(hf), hf.layer_norm_eps, "layer", heads=heads)
            for name, heads in (("q", hf.num_attention_heads), ("k", kv_heads(hf)))
        }
    attention = grouped_attention(hf, bias=bias, out_bias=bias, interleaved=True, **norms)
    return decoder_of(hf, lambda index: attention)


FIELDS = LLAMA_FIELDS - {"rms_norm_eps", "head_dim"} | {"layer_norm_eps", "logit_scale", "attention_bias"}
FAMILY = Family(
    ("cohere",), read, reads=FIELDS | {"use_qk_norm"}, fixed=LLAMA_FIXED, theta=5e5, files=LLAMA_FILES,
    harmless=frozenset({"model_max_length"}),
    published=("c4ai-command-r-v01",),
)
