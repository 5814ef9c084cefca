"""Seed-OSS: llama with biases on q, k and v, and dropout of attention and of what a block adds."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, gated_mlp, grouped_attention, llama_ends, rms
from megalora.models.spec import Layer, ModelSpec, Residual


def read(hf: Fields) -> ModelSpec:
    bias, out_bias, dropout = hf.attention_bias, hf.attention_out_bias, hf.residual_dropout
    attention = grouped_attention(hf, bias=bias, out_bias=out_bias, dropout=hf.attention_dropout)
    mlp = gated_mlp(hf, hf.mlp_bias)

    def layer(index: int) -> Layer:
        return (
            Residual(attention, rms(hf, "input_layernorm"), dropout=dropout),
            Residual(mlp, rms(hf, "post_attention_layernorm"), dropout=dropout),
        )

    return llama_ends(hf, layer, rms(hf, "model.norm"))


FAMILY = Family(
    ("seed_oss",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias", "attention_out_bias", "attention_dropout", "residual_dropout", "mlp_bias"},
    fixed={"hidden_act": "silu"},
    files=LLAMA_FILES,
    published=("Seed-OSS-36B-Instruct",),
)
