"""MPT: ALiBi, LayerNorm without biases, q k v in one linear, optionally clipped."""

from megalora.models.family import Family, Fields
from megalora.models.parts import alibi, decoder_heads, head_dim, layer_norms, plain_mlp
from megalora.models.spec import (
    Attention,
    Blocked,
    Embedding,
    FileNames,
    Fused,
    Head,
    Linear,
    ModelSpec,
    Residual,
    Stack,
)

# Of attn_config: what is read, with its default; what has one value that is implemented; what has no effect.
_ATTENTION = {"attn_pdrop": 0.0, "clip_qkv": None, "softmax_scale": None, "alibi_bias_max": 8}
_FIXED = {"attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False, "alibi": True}
_HARMLESS = {"attn_impl", "attn_uses_sequence_id", "model_type"}
_DEFAULTS = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 24, "expansion_ratio": 4, "max_seq_len": 2048,
    "vocab_size": 50368, "layer_norm_epsilon": 1e-5, "attn_config": {}, "tie_word_embeddings": True,
}  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    size, heads, dim = hf.hidden_size, hf.num_attention_heads, head_dim(hf)
    given = hf.nested("attn_config", _ATTENTION, _FIXED, _HARMLESS)
    norm, dropout = layer_norms(size, hf.layer_norm_epsilon, bias=False), given.attn_pdrop
    qkv = Fused(Linear("attn.Wqkv", size, 3 * size), Blocked((("q", heads), ("k", heads), ("v", heads)), dim))
    attention = Attention(
        qkv, qkv, qkv, Linear("attn.out_proj", size, size), heads, heads, dim, alibi(heads, given.alibi_bias_max),
        scale=given.softmax_scale, clip=given.clip_qkv, dropout=dropout,
    )  # fmt: skip
    mlp = plain_mlp(hf, "ffn.up_proj", "ffn.down_proj", hf.expansion_ratio * size, act="gelu", bias=False)
    layer = (Residual(attention, norm("norm_1"), dropout=dropout), Residual(mlp, norm("norm_2"), dropout=dropout))
    return ModelSpec(
        Embedding("transformer.wte", hf.vocab_size, size),
        Stack("transformer.blocks", (layer,) * hf.num_hidden_layers, norm("transformer.norm_f")),
        Head("lm_head", bool(hf.tie_word_embeddings)),
        hf.max_seq_len,
        task_heads=decoder_heads(hf, "classifier"),
    )


FAMILY = Family(
    ("mpt",),
    read,
    reads=frozenset(_DEFAULTS),
    fixed={
        "no_bias": True, "embedding_fraction": 1.0, "logit_scale": None, "norm_type": "low_precision_layernorm",
        "emb_pdrop": 0.0, "resid_pdrop": 0.0,
    },  # fmt: skip
    harmless=frozenset("init_device init_config learned_pos_emb verbose tokenizer_name".split()),
    # transformers' class takes no attn_pdrop but 0 and no whole number for clip_qkv, and ignores alibi_bias_max.
    remote=True,
    defaults=_DEFAULTS,
    aliases={"d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"},
    files=FileNames(prefix="transformer."),
    published=("mpt-7b", "mpt-7b-storywriter", "mpt-30b"),
)
