"""ERNIE 4.5 dense: llama whose heads rotate by neighbours, with biases on all linears or on none."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, gated_mlp, grouped_attention, llama_like
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    bias = bool(hf.use_bias)
    attention = grouped_attention(hf, bias=bias, out_bias=bias, interleaved=True)
    return llama_like(hf, lambda layer: attention, gated_mlp(hf, bias))


FAMILY = Family(
    ("ernie4_5",), read, reads=LLAMA_FIELDS | {"use_bias"}, fixed={"hidden_act": "silu"}, theta=5e5, files=LLAMA_FILES,
    published=("ERNIE-4.5-0.3B-PT",),
)
