"""IQuest-Coder: llama under a name of its own."""

import dataclasses

from megalora.models.families import llama
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return llama.read(hf)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    types=("iquestcoder",),
    read=read,
    fixed={**llama.FAMILY.fixed, "clip_qkv": None, "use_sliding_window": False},
    published=(),
    refused={},
)
