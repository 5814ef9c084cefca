"""Qwen3.5 of experts (35B-A3B to 397B-A17B): the language model of a model that reads images too."""

from megalora.models.families.qwen3_5 import FILES
from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import ModelSpec

TEXTS = {"qwen3_5_moe_text": "qwen3_5_moe_text"}


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES)


FAMILY = multimodal_family("qwen3_5_moe", read, TEXTS, published=("Qwen3.5-35B-A3B",))
