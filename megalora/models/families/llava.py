"""LLaVA 1.5 and those made like it: the language model of a model that reads images too."""

from megalora.models.family import Fields
from megalora.models.multimodal import LLAVA_FILES, multimodal_family, text_of
from megalora.models.spec import ModelSpec

TEXTS = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2"}
LLAVA_FIELDS = frozenset(
    """image_seq_length multimodal_projector_bias projector_hidden_act vision_feature_layer
    vision_feature_select_strategy""".split()
)


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, LLAVA_FILES, ties="either")


FAMILY = multimodal_family("llava", read, TEXTS, harmless=LLAVA_FIELDS | {"ignore_index"})
