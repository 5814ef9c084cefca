"""Mistral Small 3.1 and 3.2, Ministral 3, Mistral 4: the language model of a model that reads images too."""

from megalora.models.family import Fields
from megalora.models.multimodal import LLAVA_FILES, multimodal_family, text_of
from megalora.models.spec import ModelSpec

TEXTS = {"mistral": "mistral", "ministral3": "ministral3", "mistral4": "mistral4"}


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, LLAVA_FILES)


FAMILY = multimodal_family(
    "mistral3",
    read,
    TEXTS,
    harmless=frozenset(
        "multimodal_projector_bias projector_hidden_act spatial_merge_size vision_feature_layer".split()
    ),
    published=("Mistral-Small-3.1-24B-Instruct-2503",),
)
