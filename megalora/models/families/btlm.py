"""BTLM-3B: ALiBi, gate and up apart, weights stored as [in, out], scaled embeddings, scores and logits (muP)."""

from megalora.models.families.gpt2 import GPT2_FILES
from megalora.models.family import Family, Fields
from megalora.models.parts import alibi, decoder_heads, fused, head_dim, layer_norms
from megalora.models.spec import MLP, Attention, Embedding, Head, Linear, ModelSpec, Residual, Stack

_DEFAULTS = {
    "vocab_size": 50257, "max_position_embeddings": 1024, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.1,
    "embd_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "position_embedding_type": "learned", "mup_embeddings_scale": 1.0,
    "mup_output_alpha": 1.0, "mup_width_scale": 1.0, "mup_scale_qk_dot_by_d": False, "alibi_scaling": None,
    "tie_word_embeddings": True,
}  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    size, heads, dim, inner = hf.hidden_size, hf.num_attention_heads, head_dim(hf), hf.n_inner or 4 * hf.hidden_size
    norm = layer_norms(size, hf.layer_norm_epsilon)
    qkv = fused("attn.c_attn", size, (("q", heads), ("k", heads), ("v", heads)), dim, True, transposed=True)
    out = Linear("attn.c_proj", size, size, True, True)
    attention = Attention(
        qkv, qkv, qkv, out, heads, heads, dim, alibi(heads), scale=dim ** (-1.0 if hf.mup_scale_qk_dot_by_d else -0.5),
        dropout=hf.attn_pdrop,
    )  # fmt: skip
    up, gate = (Linear(f"mlp.{name}", size, inner, True, True) for name in ("c_fc", "c_fc2"))
    mlp = MLP(up, Linear("mlp.c_proj", inner, size, True, True), inner, "silu", gate)
    layer = (
        Residual(attention, norm("ln_1"), dropout=hf.resid_pdrop),
        Residual(mlp, norm("ln_2"), dropout=hf.resid_pdrop),
    )
    return ModelSpec(
        Embedding("transformer.wte", hf.vocab_size, size, scale=hf.mup_embeddings_scale, dropout=hf.embd_pdrop),
        Stack("transformer.h", (layer,) * hf.num_hidden_layers, norm("transformer.ln_f")),
        Head("lm_head", bool(hf.tie_word_embeddings), scale=hf.mup_output_alpha * hf.mup_width_scale),
        hf.max_position_embeddings,
        task_heads=decoder_heads(hf),
    )


_FIXED = {
    "activation_function": "swiglu", "position_embedding_type": "alibi", "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "alibi_scaling": None,
}  # fmt: skip

FAMILY = Family(
    ("btlm",),
    read,
    reads=frozenset(_DEFAULTS) - frozenset(_FIXED),
    fixed=_FIXED,
    harmless=frozenset("reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels "
                       "summary_type summary_use_proj".split()),
    aliases={
        "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
    },
    defaults=_DEFAULTS,
    remote=True,
    files=GPT2_FILES,
    published=("btlm-3b-8k",),
)  # fmt: skip
