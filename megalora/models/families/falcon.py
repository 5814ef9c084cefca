"""Falcon 7B, 40B, 180B, Falcon2-11B, Falcon-RW: one or few key/value heads, q k v fused, attention beside the MLP."""

from collections.abc import Mapping
from typing import Any

from megalora.models.family import Family, Fields
from megalora.models.parts import alibi, decoder_heads, head_dim, layer_norms, plain_mlp
from megalora.models.spec import (
    Attention,
    Blocked,
    ByGroup,
    ByHead,
    Embedding,
    FileNames,
    Fused,
    Head,
    Linear,
    ModelSpec,
    ParallelResidual,
    Residual,
    Rows,
    Stack,
)

FALCON_FIELDS = frozenset(
    """hidden_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings layer_norm_epsilon
    num_kv_heads multi_query new_decoder_architecture parallel_attn num_ln_in_parallel_attn bias alibi ffn_hidden_size
    activation tie_word_embeddings hidden_dropout attention_dropout""".split()
)
FALCON_FIXED: Mapping[str, Any] = {"apply_residual_connection_post_layernorm": False}
FALCON_FILES = FileNames(prefix="transformer.")


def falcon(hf: Fields) -> ModelSpec:
    """Return any Falcon."""
    size, heads, dim, new, beside = (
        hf.hidden_size, hf.num_attention_heads, head_dim(hf), hf.new_decoder_architecture, hf.parallel_attn,
    )  # fmt: skip
    if new and not beside:
        hf.fail(
            "new_decoder_architecture without parallel_attn is not implemented",
            "take config.json from the model's folder",
        )
    kv_heads = 1 if hf.multi_query and not new else hf.num_kv_heads
    if not new and kv_heads not in (1, heads):
        hf.fail(f"num_kv_heads = {kv_heads} is read with new_decoder_architecture only", "remove it")
    if heads % kv_heads:
        hf.fail(f"num_attention_heads ({heads}) is not a multiple of num_kv_heads ({kv_heads})", "correct it")
    rows: Rows = ByGroup(heads // kv_heads, dim) if new else ByHead(dim)
    if hf.multi_query and not new:
        rows = Blocked((("q", heads), ("k", 1), ("v", 1)), dim)
    qkv = Fused(Linear("self_attention.query_key_value", size, (heads + 2 * kv_heads) * dim, hf.bias), rows)
    out = Linear("self_attention.dense", size, size, hf.bias)
    position = alibi(heads, rounded=True) if hf.alibi else hf.rotary(dim)
    # transformers applies attention_dropout to the attention probabilities where there is ALiBi only.
    dropout = hf.attention_dropout if hf.alibi else 0.0
    attention = Attention(qkv, qkv, qkv, out, heads, kv_heads, dim, position, dropout=dropout)
    inner = hf.ffn_hidden_size or 4 * size
    mlp = plain_mlp(hf, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", inner, "activation", bias=hf.bias)
    norm = layer_norms(size, hf.layer_norm_epsilon)
    names = ("input_layernorm", "input_layernorm" if beside else "post_attention_layernorm")
    if new and hf.num_ln_in_parallel_attn in (None, 2):
        names = ("ln_attn", "ln_mlp")
    # Beside each other, hidden_dropout is applied to their sum; else attention_dropout to what attention adds.
    losses = (0.0, 0.0) if beside else (hf.attention_dropout, hf.hidden_dropout)
    steps = (
        Residual(attention, norm(names[0]), dropout=losses[0]), Residual(mlp, norm(names[1]), dropout=losses[1]),
    )  # fmt: skip
    layer = (ParallelResidual(steps, dropout=hf.hidden_dropout),) if beside else steps
    return ModelSpec(
        Embedding("transformer.word_embeddings", hf.vocab_size, size),
        Stack("transformer.h", (layer,) * hf.num_hidden_layers, norm("transformer.ln_f")),
        Head("lm_head", bool(hf.tie_word_embeddings)),
        hf.max_position_embeddings,
        task_heads=decoder_heads(hf, "classifier"),
    )


def read(hf: Fields) -> ModelSpec:
    return falcon(hf)


FAMILY = Family(
    ("falcon",),
    read,
    reads=FALCON_FIELDS,
    fixed=FALCON_FIXED,
    harmless=frozenset({"ff_factor"}),  # ffn_hidden_size says it
    aliases={"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    files=FALCON_FILES,
    optional=frozenset({"ffn_hidden_size"}),
    published=("falcon-7b", "falcon-40b", "falcon-rw-1b", "falcon-11b"),
)
