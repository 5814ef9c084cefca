"""Idefics3: the language model of a model that reads images too."""

from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import FileNames, ModelSpec

TEXTS = {"llama": "llama"}
FILES = FileNames(beside=("model.vision_model.", "model.connector."))


def _inside(name: str) -> str:
    """Return a name where the larger model has the head, and its text_model all else."""
    return f"model.text_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES, _inside)


FAMILY = multimodal_family("idefics3", read, TEXTS, harmless=frozenset({"scale_factor"}))
