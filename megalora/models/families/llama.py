"""Llama 2 and 3, DeepSeek-R1-Distill-Llama, SmolLM2: gated MLP, RMSNorm, grouped queries, biases only if asked for."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, gated_mlp, grouped_attention, llama_like
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, bias=hf.attention_bias, out_bias=hf.attention_bias)
    return llama_like(hf, lambda layer: attention, gated_mlp(hf, hf.mlp_bias))


FAMILY = Family(
    ("llama",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias", "mlp_bias"},
    fixed=LLAMA_FIXED,
    files=LLAMA_FILES,
)
