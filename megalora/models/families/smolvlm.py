"""SmolVLM and SmolVLM2: the language model of a model that reads images too."""

import dataclasses

from megalora.models.families import idefics3
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return idefics3.read(hf)


FAMILY = dataclasses.replace(idefics3.FAMILY, types=("smolvlm",), read=read)
