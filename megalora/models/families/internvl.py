"""InternVL 3 (the classes of transformers): the language model of a model that reads images too."""

from megalora.models.families.llava import LLAVA_FIELDS
from megalora.models.family import Fields
from megalora.models.multimodal import LLAVA_FILES, multimodal_family, text_of
from megalora.models.spec import ModelSpec

TEXTS = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "llama": "llama"}


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, LLAVA_FILES)


FAMILY = multimodal_family("internvl", read, TEXTS, harmless=LLAVA_FIELDS | {"downsample_ratio"})
