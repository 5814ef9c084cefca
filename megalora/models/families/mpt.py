"""MPT: ALiBi, LayerNorm without biases, q k v in one linear, optionally clipped."""

from megalora.models.family import Family, Fields
from megalora.models.parts import alibi, decoder_heads, head_dim, layer_norms, plain_mlp
from megalora.models.spec import Attention, Blocked, Embedding, FileNames, Fused, Head, Linear, ModelSpec, Residual, Stack

# Fields of attn_config: with the one value that is implemented, and those without effect.
_FIXED = {"attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False, "alibi": True}
_HARMLESS = {"attn_impl", "attn_uses_sequence_id", "model_type", "clip_qkv", "softmax_scale", "attn_pdrop", "alibi_bias_max"}


def read(hf: Fields) -> ModelSpec:
    size, heads, dim = hf.hidden_size, hf.num_attention_heads, head_dim(hf)
    given = hf.nested("attn_config", _FIXED, _HARMLESS)
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
    reads=frozenset(
        """hidden_size num_hidden_layers num_attention_heads vocab_size max_seq_len attn_config expansion_ratio
        layer_norm_epsilon tie_word_embeddings""".split()
    ),
    fixed={
        "no_bias": True, "embedding_fraction": 1.0, "logit_scale": None, "norm_type": "low_precision_layernorm",
        "emb_pdrop": 0.0, "resid_pdrop": 0.0,
    },  # fmt: skip
    harmless=frozenset("init_device init_config learned_pos_emb verbose tokenizer_name".split()),
    files=FileNames(prefix="transformer."),
)
