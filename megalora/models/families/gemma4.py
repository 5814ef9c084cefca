"""Gemma 4 (31B, 26B-A4B): the language model of a model that reads images too."""

from dataclasses import replace

from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import FileNames, ModelSpec

TEXTS = {"gemma4_text": "gemma4_text"}
FILES = FileNames(
    beside=("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.")
)  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES)


_FAMILY = multimodal_family(
    "gemma4",
    read,
    TEXTS,
    harmless=frozenset(
        """boi_token_id eoi_token_id boa_token_id eoa_token_id eoa_token_index audio_token_id audio_config
        vision_soft_tokens_per_image""".split()
    ),
)
# The default has vectors of each layer's own, which are not implemented.
FAMILY = replace(
    _FAMILY, example={"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}}
)  # fmt: skip
