"""Qwen3-VL (2B to 32B): the language model of a model that reads images too."""

from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import FileNames, ModelSpec

TEXTS = {"qwen3_vl_text": "qwen3"}
FILES = FileNames(beside=("model.visual.",))
DEFAULTS = {"rope_theta": 5e5, "max_position_embeddings": 128000}  # transformers', which are not those of qwen3


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES, defaults=DEFAULTS)


FAMILY = multimodal_family("qwen3_vl", read, TEXTS)
