"""OLMo 3: OLMo 2 with a sliding window on three of four layers, whose rotations are never scaled."""

from megalora.models.families.olmo2 import FIELDS, attention_of, decoder_of
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, LLAMA_FIXED, layer_windows
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    window = layer_windows(hf)
    return decoder_of(hf, lambda index: attention_of(hf, window[index]))


FAMILY = Family(
    ("olmo3",),
    read,
    reads=FIELDS | {"layer_types", "sliding_window"},
    fixed=LLAMA_FIXED,
    theta=5e5,
    sliding_theta=("rope_theta", 5e5),
    files=LLAMA_FILES,
    published=("Olmo-3-1025-7B",),
)
