"""OLMo 2: norms behind each block, none before; RMSNorm over all heads of q and k together."""

from collections.abc import Callable

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    gated_mlp,
    grouped_attention,
    llama_ends,
    norms_over_heads,
    rms,
)
from megalora.models.spec import Attention, Layer, ModelSpec, Residual


def attention_of(hf: Fields, window: int | None = None) -> Attention:
    """Return OLMo 2's attention, with a window where it has one."""
    bias, norms = hf.attention_bias, norms_over_heads(hf, precise=True)
    return grouped_attention(hf, bias=bias, out_bias=bias, window=window, **norms)


def decoder_of(hf: Fields, attention: Callable[[int], Attention]) -> ModelSpec:
    """Return a decoder of OLMo 2's layers around the attention of each."""
    mlp = gated_mlp(hf)

    def layer(index: int) -> Layer:
        return (
            Residual(attention(index), None, rms(hf, "post_attention_layernorm", precise=True)),
            Residual(mlp, None, rms(hf, "post_feedforward_layernorm", precise=True)),
        )

    return llama_ends(hf, layer, rms(hf, "model.norm", precise=True))


def read(hf: Fields) -> ModelSpec:
    attention = attention_of(hf)
    return decoder_of(hf, lambda index: attention)


FIELDS = LLAMA_FIELDS - {"head_dim"} | {"attention_bias"}
FAMILY = Family(
    ("olmo2",), read, reads=FIELDS, fixed=LLAMA_FIXED, files=LLAMA_FILES,
    published=("OLMo-2-1124-7B", "OLMo-2-1124-13B"),
)
