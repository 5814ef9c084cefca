"""Helium: llama whose heads rotate by neighbours, with RMSNorm weights applied in float32."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    gated_mlp,
    grouped_attention,
    llama_ends,
    rms,
)
from megalora.models.spec import Layer, ModelSpec, Residual


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, bias=hf.attention_bias, interleaved=True)
    mlp = gated_mlp(hf, hf.mlp_bias)

    def layer(index: int) -> Layer:
        return (
            Residual(attention, rms(hf, "input_layernorm", precise=True)),
            Residual(mlp, rms(hf, "post_attention_layernorm", precise=True)),
        )

    return llama_ends(hf, layer, rms(hf, "model.norm", precise=True))


FAMILY = Family(
    ("helium",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias", "mlp_bias"},
    fixed=LLAMA_FIXED,
    theta=1e5,
    files=LLAMA_FILES,
    published=("helium-1-preview-2b",),
)
