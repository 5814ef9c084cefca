"""Llama 2, 3 and kin: DeepSeek-R1-Distill-Llama, SmolLM2."""

from megalora.models.config import Family

FAMILY = Family(
    "llama",
    qkv_bias=lambda hf: hf.attention_bias,
    output_bias=lambda hf: hf.attention_bias,
    mlp_bias=lambda hf: hf.mlp_bias,
)
