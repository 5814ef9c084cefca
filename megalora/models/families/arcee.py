"""Arcee AFM: llama with a plain MLP, whose activation is squared relu."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, grouped_attention, llama_like, plain_mlp
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, bias=hf.attention_bias, out_bias=hf.attention_bias)
    inner = hf.intermediate_size
    mlp = plain_mlp(hf, "mlp.up_proj", "mlp.down_proj", inner, "hidden_act", bias=hf.mlp_bias)
    return llama_like(hf, lambda layer: attention, mlp)


FAMILY = Family(
    ("arcee",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias", "mlp_bias", "hidden_act"},
    fixed={"attention_dropout": 0.0},
    files=LLAMA_FILES,
)
