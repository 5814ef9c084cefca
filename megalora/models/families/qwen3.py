"""Qwen3: RMSNorm on each head of q and k, no biases unless asked for; windows as in Qwen2."""

from megalora.models.config import Family
from megalora.models.families.qwen2 import windows

FAMILY = Family(
    "qwen3",
    qkv_bias=lambda hf: hf.attention_bias,
    output_bias=lambda hf: hf.attention_bias,
    qk_norm=True,
    windows=windows,
)
