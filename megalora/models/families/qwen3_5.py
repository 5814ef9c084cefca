"""Qwen3.5 (0.8B to 27B): the language model of a model that reads images too."""

from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import FileNames, ModelSpec

TEXTS = {"qwen3_5_text": "qwen3_5_text"}
FILES = FileNames(beside=("model.visual.",), ahead=("mtp.",))


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES)


FAMILY = multimodal_family("qwen3_5", read, TEXTS, published=("Qwen3.5-9B", "Qwen3.5-27B"))
