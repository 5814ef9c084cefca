"""Qwen3: RMSNorm on each head of q and k, no biases unless asked for; windows as in Qwen2."""

from megalora.models.families.qwen2 import WINDOW_FIELDS, windows
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, gated_mlp, grouped_attention, llama_like
from megalora.models.spec import Attention, ModelSpec


def read(hf: Fields) -> ModelSpec:
    window, bias = windows(hf), hf.attention_bias

    def attention(layer: int) -> Attention:
        return grouped_attention(hf, bias=bias, out_bias=bias, window=window[layer], qk_norm=True)

    return llama_like(hf, attention, gated_mlp(hf))


FAMILY = Family(
    ("qwen3",), read, reads=LLAMA_FIELDS | WINDOW_FIELDS | {"attention_bias"}, fixed=LLAMA_FIXED, files=LLAMA_FILES,
    published=(
        "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-8B-Base",
        "Qwen3-4B-Instruct-2507", "Qwen3-4B-Thinking-2507", "Qwen3-Embedding-0.6B", "Qwen3-Reranker-0.6B",
    ),
    refused={
        "Qwen3-32B-AWQ": "its weights are quantised by a method that is not read",
        "DeepSeek-R1-0528-Qwen3-8B":
            "`attn_factor` is no field that transformers reads: the message says what to write",
    },
)  # fmt: skip
