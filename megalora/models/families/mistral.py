"""Mistral: every layer slides its window where the config has one."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, gated_mlp, grouped_attention, llama_like
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, window=hf.sliding_window)
    return llama_like(hf, lambda layer: attention, gated_mlp(hf))


FAMILY = Family(
    ("mistral",), read, reads=LLAMA_FIELDS | {"sliding_window"}, fixed=LLAMA_FIXED, files=LLAMA_FILES,
    published=(
        "Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.1", "Mistral-7B-Instruct-v0.2", "Mistral-7B-v0.3",
        "Mathstral-7B-v0.1", "Codestral-22B-v0.1", "Mistral-Small-Instruct-2409", "Mistral-Large-Instruct-2407",
        "Mistral-Large-Instruct-2411", "Mistral-Nemo-Base-2407", "Mistral-Nemo-Instruct-2407",
        "Mistral-NeMo-Minitron-8B-Base", "Mistral-Small-24B-Base-2501", "Devstral-Small-2505", "Magistral-Small-2506",
        "Ministral-8B-Instruct-2410", "zephyr-7b-beta", "OpenHermes-2.5-Mistral-7B", "openchat-3.5-1210",
        "Starling-LM-7B-alpha",
    ),
    refused={
        "e5-mistral-7b-instruct": "its folder has no head that writes text",
    },
)
