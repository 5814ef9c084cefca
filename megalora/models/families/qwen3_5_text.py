"""Qwen3.5, the language model: linear attention by the gated delta rule in three of four layers."""

from megalora.models.family import Family, Fields
from megalora.models.hybrids import (
    HYBRID_FIELDS,
    HYBRID_FILES,
    HYBRID_FIXED,
    HYBRID_HARMLESS,
    HYBRID_OPTIONAL,
    hybrid,
    plain_delta,
)
from megalora.models.parts import gated_mlp
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    mlp = gated_mlp(hf)
    return hybrid(hf, plain_delta(hf), lambda layer: mlp)


FAMILY = Family(
    ("qwen3_5_text",),
    read,
    reads=HYBRID_FIELDS,
    fixed=HYBRID_FIXED,
    harmless=HYBRID_HARMLESS,
    optional=HYBRID_OPTIONAL,
    rope_harmless=frozenset({"mrope_section", "mrope_interleaved"}),  # in a text the three positions are one
    partial=0.25,
    files=HYBRID_FILES,
)
