"""Gemma and CodeGemma: RMSNorm with 1 + w, gated MLP with gelu, the embedding's rows times sqrt(hidden_size)."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    gated_mlp,
    grouped_attention,
    llama_ends,
    rms,
    scaled_ends,
)
from megalora.models.spec import Layer, ModelSpec, Norm, Residual


def norm(hf: Fields, name: str, size: int | None = None) -> Norm:
    return rms(hf, name, size, precise=True, offset=True)


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, bias=hf.attention_bias, out_bias=hf.attention_bias)
    mlp = gated_mlp(hf, act=hf.activation_of("hidden_act"))

    def layer(index: int) -> Layer:
        return (
            Residual(attention, norm(hf, "input_layernorm")),
            Residual(mlp, norm(hf, "post_attention_layernorm")),
        )

    return scaled_ends(llama_ends(hf, layer, norm(hf, "model.norm")), embedding=hf.hidden_size**0.5, rounded=True)


FAMILY = Family(
    ("gemma",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias", "hidden_act"},
    fixed={"attention_dropout": 0.0, "hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
    files=LLAMA_FILES,
    published=("gemma-2b", "gemma-7b"),
)
