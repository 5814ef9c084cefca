"""GLM-4.1V: the language model of a model that reads images too."""

from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import FileNames, ModelSpec

TEXTS = {"glm4v_text": "glm4"}
FILES = FileNames(beside=("model.visual.",))
DEFAULTS = {  # transformers', which are not those of glm4
    "attention_bias": True, "partial_rotary_factor": 1.0, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    sizes = (hf.text_config.get("hidden_size", 4096), hf.text_config.get("num_attention_heads", 32))
    sound = all(isinstance(size, int) and size > 0 for size in sizes)  # else they are refused where they are read
    own = {"head_dim": sizes[0] // sizes[1]} if sound else {}
    return text_of(hf, TEXTS, FILES, defaults=DEFAULTS | own, ties="either")


FAMILY = multimodal_family(
    "glm4v",
    read,
    TEXTS,
    harmless=frozenset(
        "image_start_token_id image_end_token_id video_start_token_id video_end_token_id".split()
    ),
)  # fmt: skip
