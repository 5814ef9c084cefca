"""Apertus: llama with RMSNorm on each head and a plain MLP with xIELU, whose numbers each layer has learned."""

from dataclasses import replace

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    grouped_attention,
    llama_ends,
    plain_mlp,
    rms,
)
from megalora.models.spec import Layer, ModelSpec, Residual


def read(hf: Fields) -> ModelSpec:
    bias, inner = hf.attention_bias, hf.intermediate_size
    attention = grouped_attention(hf, bias=bias, out_bias=bias, qk_norm=True)
    mlp = plain_mlp(hf, "mlp.up_proj", "mlp.down_proj", inner, act="xielu", bias=False)
    mlp = replace(mlp, learned="mlp.act_fn")

    def layer(index: int) -> Layer:
        return (
            Residual(attention, rms(hf, "attention_layernorm")),
            Residual(mlp, rms(hf, "feedforward_layernorm")),
        )

    return llama_ends(hf, layer, rms(hf, "model.norm"))


FAMILY = Family(
    ("apertus",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias"},
    fixed={
        "hidden_act": "xielu", "attention_dropout": 0.0, "hidden_dropout": 0.0, "mlp_bias": False, "qk_norm": True,
        "post_norm": False,
    },  # fmt: skip
    theta=12e6,
    scaled=True,
    files=LLAMA_FILES,
    published=("Apertus-8B-Instruct-2509",),
)
