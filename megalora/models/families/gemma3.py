"""Gemma 3 (4B, 12B, 27B), MedGemma: the language model of a model that reads images too."""

from dataclasses import replace

from megalora.models.family import Fields
from megalora.models.multimodal import LLAVA_FILES, multimodal_family, text_of
from megalora.models.spec import ModelSpec

TEXTS = {"gemma3_text": "gemma3_text"}
LONGEST = 131072  # where text_config leaves it out


def read(hf: Fields) -> ModelSpec:
    longest = hf.text_config.get("max_position_embeddings", LONGEST)  # which counts what rope_scaling adds
    return replace(text_of(hf, TEXTS, LLAVA_FILES), max_position_embeddings=longest)


FAMILY = multimodal_family(
    "gemma3", read, TEXTS, harmless=frozenset("boi_token_index eoi_token_index mm_tokens_per_image".split()),
    published=("gemma-3-4b-it",),
)
