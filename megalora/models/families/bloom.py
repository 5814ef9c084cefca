"""BLOOM and BLOOMZ: ALiBi, a LayerNorm behind the embedding, q k v fused by heads."""

from megalora.models.family import Family, Fields
from megalora.models.parts import alibi, decoder_heads, head_dim, layer_norms, plain_mlp
from megalora.models.spec import (
    Attention,
    ByHead,
    Embedding,
    FileNames,
    Fused,
    Head,
    Linear,
    ModelSpec,
    Residual,
    Stack,
)


def read(hf: Fields) -> ModelSpec:
    size, heads, dim = hf.hidden_size, hf.num_attention_heads, head_dim(hf)
    norm, dropout = layer_norms(size, hf.layer_norm_epsilon), hf.hidden_dropout
    qkv = Fused(Linear("self_attention.query_key_value", size, 3 * size, True), ByHead(dim))
    out = Linear("self_attention.dense", size, size, True)
    attention = Attention(qkv, qkv, qkv, out, heads, heads, dim, alibi(heads), dropout=hf.attention_dropout)
    mlp = plain_mlp(hf, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", 4 * size, act="gelu_pytorch_tanh")
    layer = (
        Residual(attention, norm("input_layernorm"), dropout=dropout),
        Residual(mlp, norm("post_attention_layernorm"), dropout=dropout),
    )
    entry = norm("transformer.word_embeddings_layernorm")
    return ModelSpec(
        Embedding("transformer.word_embeddings", hf.vocab_size, size, norm=entry),
        Stack("transformer.h", (layer,) * hf.num_hidden_layers, norm("transformer.ln_f")),
        Head("lm_head", bool(hf.tie_word_embeddings)),
        hf.seq_length or 2048,
        task_heads=decoder_heads(hf, "classifier"),
    )


FAMILY = Family(
    ("bloom",),
    read,
    reads=frozenset(
        """hidden_size num_hidden_layers num_attention_heads vocab_size layer_norm_epsilon tie_word_embeddings
        seq_length hidden_dropout attention_dropout""".split()
    ),
    fixed={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False, "n_inner": None},
    harmless=frozenset(
        """pretraining_tp attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion offset_alibi skip_bias_add
        skip_bias_add_qkv unk_token_id""".split()
    ),
    rotates=False,
    aliases={"n_embed": "hidden_size"},
    files=FileNames(prefix="transformer."),
    optional=frozenset({"seq_length"}),
    published=("bloom-560m", "bloom-1b7", "bloom-7b1", "bloom"),
)
