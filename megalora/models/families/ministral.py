"""Ministral: Mistral whose layers each say whether their window slides."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    gated_mlp,
    grouped_attention,
    layer_windows,
    llama_like,
)
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    windows = layer_windows(hf)
    return llama_like(hf, lambda layer: grouped_attention(hf, window=windows[layer]), gated_mlp(hf))


FAMILY = Family(
    ("ministral",), read, reads=LLAMA_FIELDS | {"sliding_window", "layer_types"}, fixed=LLAMA_FIXED, files=LLAMA_FILES
)
