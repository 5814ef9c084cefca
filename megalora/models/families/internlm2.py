"""InternLM2 and InternLM2.5: llama's mathematics with q k v of each group of heads in one linear."""

from megalora.models.family import Family, Fields
from megalora.models.parts import decoder, gated_mlp, head_dim, kv_heads, rms
from megalora.models.spec import Attention, ByGroup, Fused, Linear, ModelSpec, Residual, Stack

_DEFAULTS = {
    "vocab_size": 103168, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "bias": True, "classifier_dropout": None,
}  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    size, heads, kv, dim, bias = hf.hidden_size, hf.num_attention_heads, kv_heads(hf), head_dim(hf), bool(hf.bias)
    rows = ByGroup(heads // kv, dim)
    qkv = Fused(Linear("attention.wqkv", size, (heads + 2 * kv) * dim, bias), rows)
    out = Linear("attention.wo", heads * dim, size, bias)
    attention = Attention(qkv, qkv, qkv, out, heads, kv, dim, hf.rotary(dim))
    mlp = gated_mlp(hf, at="feed_forward", names=("w1", "w3", "w2"))
    layer = (Residual(attention, rms(hf, "attention_norm")), Residual(mlp, rms(hf, "ffn_norm")))
    stack = Stack("model.layers", (layer,) * hf.num_hidden_layers, rms(hf, "model.norm"))
    return decoder(hf, stack, embedding="model.tok_embeddings", head="output")


FAMILY = Family(
    ("internlm2",),
    read,
    reads=frozenset(_DEFAULTS),
    fixed={"hidden_act": "silu"},
    harmless=frozenset({"attn_implementation"}),
    defaults=_DEFAULTS,
    remote=True,
    published=("internlm2-1_8b", "internlm2-7b", "internlm2_5-7b-chat", "internlm2-20b"),
)
