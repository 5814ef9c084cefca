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
    layer_norms,
    llama_ends,
    scaled_ends,
)
from megalora.models.spec import Attention, Layer, Mixer, ModelSpec, Norm, ParallelResidual, Residual


def decoder_of(
    hf: Fields,
    attention: Callable[[int], Attention],
    mlp: Callable[[int], Mixer] | None = None,
    norm: Callable[[str], Norm] | None = None,
) -> ModelSpec:
    """Return a decoder of Cohere's layers around the attention of each.

    mlp   of each layer; None: llama's
    norm  makes norms by name; None: LayerNorm without bias
    """
    dense = gated_mlp(hf) if mlp is None else None
    norm = norm or layer_norms(hf.hidden_size, hf.layer_norm_eps, bias=False)

    def layer(index: int) -> Layer:
        before = norm("input_layernorm")
        beside = mlp(index) if dense is None else dense
        return (ParallelResidual((Residual(attention(index), before), Residual(beside, before))),)

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
