"""Qwen2.5-VL: the language model of a model that reads images too."""

from megalora.models.families.qwen2_vl import DEFAULTS, FILES
from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import ModelSpec

TEXTS = {"qwen2_5_vl_text": "qwen2"}


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES, defaults=DEFAULTS, ties="either")


FAMILY = multimodal_family(
    "qwen2_5_vl", read, TEXTS, flat=True,
    published=("Qwen2.5-VL-7B-Instruct",),
)
