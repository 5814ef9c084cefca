"""Ministral 3 (text), Devstral 2: Mistral whose queries grow with their position beyond the length before YaRN."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, gated_mlp, grouped_attention, llama_like
from megalora.models.spec import ModelSpec, Temperature

_LENGTH, _BETA = "original_max_position_embeddings", "llama_4_scaling_beta"


def temperature_of(hf: Fields) -> Temperature | None:
    """Return that of the queries, by the rope fields. Raises UserError where these lack it."""
    for name in (_LENGTH, _BETA):
        if hf.rope.get(name) is None:
            hf.fail(f"rope_parameters has no {name}", "take config.json from the model's own folder")
    return Temperature(hf.rope[_LENGTH], hf.rope[_BETA], first=0) if hf.rope[_BETA] else None


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, window=hf.sliding_window, temperature=temperature_of(hf))
    return llama_like(hf, lambda layer: attention, gated_mlp(hf))


FAMILY = Family(
    ("ministral3",),
    read,
    reads=LLAMA_FIELDS | {"sliding_window"},
    fixed=LLAMA_FIXED,
    rope_reads=frozenset({_LENGTH, _BETA}),
    rope_harmless=frozenset({"max_position_embeddings"}),
    scaled=True,
    files=LLAMA_FILES,
    published=("Ministral-3-8B-Base-2512, its text_config",),
)
