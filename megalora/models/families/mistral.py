"""Mistral: every layer slides its window where the config has one."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, gated_mlp, grouped_attention, llama_like
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, window=hf.sliding_window)
    return llama_like(hf, lambda layer: attention, gated_mlp(hf))


FAMILY = Family(("mistral",), read, reads=LLAMA_FIELDS | {"sliding_window"}, fixed=LLAMA_FIXED, files=LLAMA_FILES)
