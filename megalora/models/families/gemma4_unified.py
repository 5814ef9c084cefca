"""Gemma 4 (12B): the language model of a model that reads images and sounds without towers of their own."""

from dataclasses import replace

from megalora.models.families import gemma4
from megalora.models.family import Fields
from megalora.models.multimodal import text_of
from megalora.models.spec import FileNames, ModelSpec

TEXTS = {"gemma4_unified_text": "gemma4_text"}
FILES = FileNames(beside=("model.vision_embedder.", "model.embed_vision.", "model.embed_audio."))
DEFAULTS = {  # transformers', which are not those of gemma4_text
    "sliding_window": 1024, "max_position_embeddings": 262144, "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
}  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES, defaults=DEFAULTS)


FAMILY = replace(
    gemma4.FAMILY,
    types=("gemma4_unified",),
    read=read,
    inner=TEXTS,
    example={"text_config": {"model_type": "gemma4_unified_text"}},
)
