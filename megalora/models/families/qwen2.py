"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: biases on q, k, v; layers from max_window_layers on may have windows."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    gated_mlp,
    grouped_attention,
    layer_windows,
    llama_like,
)
from megalora.models.spec import ModelSpec

WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def windows(hf: Fields) -> tuple[int | None, ...]:
    """Return each layer's window by HF's rule: `layer_types` where the config has it, else `max_window_layers`."""
    if not hf.use_sliding_window or hf.sliding_window is None:
        return (None,) * hf.num_hidden_layers
    if hf.layer_types is not None:
        return layer_windows(hf)
    return tuple(hf.sliding_window if i >= hf.max_window_layers else None for i in range(hf.num_hidden_layers))


def read(hf: Fields) -> ModelSpec:
    window = windows(hf)
    return llama_like(hf, lambda layer: grouped_attention(hf, bias=True, window=window[layer]), gated_mlp(hf))


FAMILY = Family(
    ("qwen2",), read, reads=LLAMA_FIELDS | WINDOW_FIELDS, fixed=LLAMA_FIXED, files=LLAMA_FILES,
    published=(
        "Qwen1.5-0.5B", "Qwen1.5-1.8B", "Qwen1.5-4B", "Qwen1.5-7B", "Qwen1.5-14B", "Qwen1.5-32B", "Qwen1.5-72B",
        "Qwen1.5-110B", "CodeQwen1.5-7B", "Qwen2-0.5B", "Qwen2-1.5B", "Qwen2-7B", "Qwen2-72B", "Qwen2.5-0.5B",
        "Qwen2.5-1.5B-Instruct", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen2.5-14B", "Qwen2.5-32B-Instruct",
        "Qwen2.5-72B-Instruct", "Qwen2.5-7B-Instruct with YaRN", "Qwen2.5-7B-Instruct-1M", "Qwen2.5-Coder-7B",
        "Qwen2.5-Coder-32B-Instruct", "Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B", "QwQ-32B",
        "DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B",
    ),
    refused={
        "Qwen2.5-7B-Instruct-AWQ": "its weights are quantised by a method that is not read",
        "Qwen2.5-Math-RM-72B": "its head gives rewards",
        "gte-Qwen2-7B-instruct": "its attention is not causal",
    },
)
