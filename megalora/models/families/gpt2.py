"""GPT-2, DistilGPT-2, DialoGPT: learned positions, LayerNorm, q k v in one linear, weights stored as [in, out]."""

from megalora.models.family import Family, Fields
from megalora.models.parts import decoder_heads, head_dim, layer_norms, plain_mlp
from megalora.models.spec import (
    BUFFERS,
    Attention,
    Blocked,
    ByHead,
    Embedding,
    FileNames,
    Fused,
    Head,
    Linear,
    ModelSpec,
    Positions,
    Residual,
    Stack,
)

GPT2_FIELDS = frozenset(
    """hidden_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings n_inner activation_function
    layer_norm_epsilon tie_word_embeddings scale_attn_weights attn_pdrop embd_pdrop resid_pdrop""".split()
)
GPT2_FILES = FileNames((), (*BUFFERS, "attn.bias", "attn.masked_bias"), "transformer.")
# Of the heads of other tasks than language modelling, and of numbers in which attention is computed.
GPT2_HARMLESS = frozenset(
    """n_ctx output_past summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32""".split()
)


def gpt2_like(hf: Fields, kv_heads: int, transposed: bool, by_layer: bool = False) -> ModelSpec:
    """Return a GPT-2; by_layer: scores are also divided by the layer's number."""
    size, heads, dim, inner = hf.hidden_size, hf.num_attention_heads, head_dim(hf), hf.n_inner or 4 * hf.hidden_size
    norm = layer_norms(size, hf.layer_norm_epsilon)
    blocked = Blocked((("q", heads), ("k", kv_heads), ("v", kv_heads)), dim)
    rows = blocked if transposed or kv_heads < heads else ByHead(dim)
    qkv = Fused(Linear("attn.c_attn", size, (heads + 2 * kv_heads) * dim, True, transposed), rows)
    out = Linear("attn.c_proj", size, size, True, transposed)
    mlp = plain_mlp(hf, "mlp.c_fc", "mlp.c_proj", inner, "activation_function", transposed=transposed)
    scale = dim**-0.5 if hf.scale_attn_weights else 1.0

    def layer(index: int) -> tuple[Residual, ...]:
        of_layer = scale / (index + 1) if by_layer else scale
        attention = Attention(qkv, qkv, qkv, out, heads, kv_heads, dim, None, scale=of_layer, dropout=hf.attn_pdrop)
        return (
            Residual(attention, norm("ln_1"), dropout=hf.resid_pdrop),
            Residual(mlp, norm("ln_2"), dropout=hf.resid_pdrop),
        )

    positions = Positions("transformer.wpe", hf.max_position_embeddings)
    return ModelSpec(
        Embedding("transformer.wte", hf.vocab_size, size, positions=positions, dropout=hf.embd_pdrop),
        Stack("transformer.h", tuple(map(layer, range(hf.num_hidden_layers))), norm("transformer.ln_f")),
        Head("lm_head", bool(hf.tie_word_embeddings)),
        hf.max_position_embeddings,
        task_heads=decoder_heads(hf, "classifier"),
    )


def read(hf: Fields) -> ModelSpec:
    return gpt2_like(hf, hf.num_attention_heads, True, bool(hf.scale_attn_by_inverse_layer_idx))


FAMILY = Family(
    ("gpt2",),
    read,
    reads=GPT2_FIELDS | {"scale_attn_by_inverse_layer_idx"},
    harmless=GPT2_HARMLESS,
    files=GPT2_FILES,
    rotates=False,
    published=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"),
)
