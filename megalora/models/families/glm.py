"""GLM-4 9B (the classes of transformers): half of each head rotates, by neighbours; gate and up in one linear."""

from collections.abc import Callable

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    fused,
    grouped_attention,
    llama_ends,
    rms,
)
from megalora.models.spec import MLP, Layer, Linear, Mixer, ModelSpec, Residual


def decoder_of(hf: Fields, layer: Callable[[Mixer, Mixer], Layer]) -> ModelSpec:
    """Return a decoder of GLM's attention and MLP, composed by `layer`."""
    size, inner = hf.hidden_size, hf.intermediate_size
    attention = grouped_attention(hf, bias=hf.attention_bias, interleaved=True)
    gate_up = fused("mlp.gate_up_proj", size, (("gate", inner), ("up", inner)))
    mlp = MLP(gate_up, Linear("mlp.down_proj", inner, size), inner, "silu", gate_up)
    return llama_ends(hf, lambda index: layer(attention, mlp), rms(hf, "model.norm"))


def read(hf: Fields) -> ModelSpec:
    def layer(attention: Mixer, mlp: Mixer) -> Layer:
        return (
            Residual(attention, rms(hf, "input_layernorm")),
            Residual(mlp, rms(hf, "post_attention_layernorm")),
        )

    return decoder_of(hf, layer)


FIELDS = LLAMA_FIELDS | {"attention_bias"}
FAMILY = Family(
    ("glm",), read, reads=FIELDS, fixed=LLAMA_FIXED, partial=0.5, files=LLAMA_FILES,
    published=("glm-4-9b-chat-hf",),
)
