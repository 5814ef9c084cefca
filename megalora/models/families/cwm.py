"""Code World Model: llama with a sliding window on three of four layers."""

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
    window = layer_windows(hf)
    return llama_like(hf, lambda layer: grouped_attention(hf, window=window[layer]), gated_mlp(hf, hf.mlp_bias))


FAMILY = Family(
    ("cwm",),
    read,
    reads=LLAMA_FIELDS | {"layer_types", "sliding_window", "mlp_bias"},
    fixed=LLAMA_FIXED,
    theta=1e6,
    scaled=True,
    files=LLAMA_FILES,
    published=("cwm",),
)
