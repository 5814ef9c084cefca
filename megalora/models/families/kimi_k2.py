"""Kimi-K2: DeepSeek-V3 under a name of its own, with more experts and fewer heads."""

import dataclasses

from megalora.models.families import deepseek_v3
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return deepseek_v3.read(hf)


# Its config.json names DeepSeek's own code; transformers knows that as deepseek_v3.
FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY, types=("kimi_k2",), read=read, config_class="deepseek_v3",
    published=("Kimi-K2-Instruct",),
)
