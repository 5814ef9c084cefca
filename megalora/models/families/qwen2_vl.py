"""Qwen2-VL: the language model of a model that reads images too."""

from megalora.models.family import Fields
from megalora.models.multimodal import multimodal_family, text_of
from megalora.models.spec import FileNames, ModelSpec

TEXTS = {"qwen2_vl_text": "qwen2"}
FILES = FileNames(renames=(("model.", "model.language_model."),), beside=("visual.", "model.visual."))
DEFAULTS = {  # transformers', which are not those of qwen2
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "max_window_layers": 80,
}  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    return text_of(hf, TEXTS, FILES, defaults=DEFAULTS, ties="either")


FAMILY = multimodal_family("qwen2_vl", read, TEXTS, flat=True)
