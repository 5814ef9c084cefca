"""Phi-3, Phi-3.5 and Phi-4: llama's mathematics with q k v in one linear, and gate and up in another; longrope."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, fused, head_dim, kv_heads, llama_like
from megalora.models.spec import MLP, Attention, Linear, ModelSpec


def read(hf: Fields) -> ModelSpec:
    size, heads, kv, dim = hf.hidden_size, hf.num_attention_heads, kv_heads(hf), head_dim(hf)
    inner = hf.intermediate_size
    qkv = fused("self_attn.qkv_proj", size, (("q", heads), ("k", kv), ("v", kv)), dim)
    out = Linear("self_attn.o_proj", heads * dim, size)
    attention = Attention(qkv, qkv, qkv, out, heads, kv, dim, hf.rotary(dim), hf.sliding_window)
    gate_up = fused("mlp.gate_up_proj", size, (("gate", inner), ("up", inner)))
    mlp = MLP(gate_up, Linear("mlp.down_proj", inner, size), inner, "silu", gate_up)
    return llama_like(hf, lambda layer: attention, mlp)


FAMILY = Family(
    ("phi3",),
    read,
    reads=LLAMA_FIELDS - {"head_dim"} | {"sliding_window"},
    fixed=LLAMA_FIXED | {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_bias": False},
    harmless=frozenset({"original_max_position_embeddings"}),  # of longrope: read with its fields
    partial=1.0,
    files=LLAMA_FILES,
    published=("Phi-3-mini-4k-instruct", "Phi-3.5-mini-instruct", "phi-4"),
)
