"""VaultGemma: Gemma 2 without the norms behind attention and MLP."""

from megalora.models.families import gemma2
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return gemma2.read(hf, behind=False)


FAMILY = Family(
    ("vaultgemma",),
    read,
    reads=gemma2.FIELDS,
    fixed=gemma2.FIXED,
    harmless=frozenset({"cache_implementation"}),
    files=LLAMA_FILES,
)
