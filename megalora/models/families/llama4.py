"""Llama 4 (Scout, Maverick): the language model of a model that reads images too."""

from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import FileNames, ModelSpec

TEXTS = {"llama4_text": "llama4_text"}
FILES = FileNames(beside=("vision_model.", "multi_modal_projector."))


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES, lambda name: f"language_model.{name}", ties="text")


FAMILY = multimodal_family("llama4", read, TEXTS, harmless=frozenset("boi_token_index eoi_token_index".split()))
