"""Gemma 3 (text): Gemma 2 without softcaps, norms on q and k, rotations of their own on layers that slide."""

from megalora.models.families import gemma2
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return gemma2.read(hf, qk_norm=True)


FAMILY = Family(
    ("gemma3_text",),
    read,
    reads=gemma2.FIELDS,
    fixed=gemma2.FIXED,
    harmless=frozenset({"cache_implementation", "sliding_window_pattern"}),  # layer_types says which layers slide
    theta=1e6,
    sliding_theta=("rope_local_base_freq", 1e4),
    files=LLAMA_FILES,
    published=("gemma-3-1b-it",),
)
