"""Phi-1, Phi-1.5 and Phi-2: attention beside MLP behind one LayerNorm, half of each head rotates, biases everywhere."""

from megalora.models.family import Family, Fields
from megalora.models.parts import decoder_heads, head_dim, kv_heads, layer_norms, plain_mlp
from megalora.models.spec import (
    Attention,
    Embedding,
    FileNames,
    Head,
    Linear,
    ModelSpec,
    ParallelResidual,
    Residual,
    Stack,
)


def read(hf: Fields) -> ModelSpec:
    size, heads, kv, dim = hf.hidden_size, hf.num_attention_heads, kv_heads(hf), head_dim(hf)
    norm = layer_norms(size, hf.layer_norm_eps)
    q, k, v = (Linear(f"self_attn.{x}_proj", size, n * dim, True) for x, n in (("q", heads), ("k", kv), ("v", kv)))
    of_head = layer_norms(dim, hf.layer_norm_eps)
    q_norm, k_norm = (of_head(f"self_attn.{x}_layernorm") if hf.qk_layernorm else None for x in "qk")
    attention = Attention(
        q, k, v, Linear("self_attn.dense", heads * dim, size, True), heads, kv, dim, hf.rotary(dim),
        q_norm=q_norm, k_norm=k_norm, dropout=hf.attention_dropout,
    )  # fmt: skip
    mlp = plain_mlp(hf, "mlp.fc1", "mlp.fc2", hf.intermediate_size, "hidden_act")
    branches = tuple(Residual(mixer, norm("input_layernorm"), dropout=hf.resid_pdrop) for mixer in (attention, mlp))
    layers = ((ParallelResidual(branches),),) * hf.num_hidden_layers
    return ModelSpec(
        Embedding("model.embed_tokens", hf.vocab_size, size, dropout=hf.embd_pdrop),
        Stack("model.layers", layers, norm("model.final_layernorm")),
        Head("lm_head", bool(hf.tie_word_embeddings), bias=True),
        hf.max_position_embeddings,
        task_heads=decoder_heads(hf),
    )


FAMILY = Family(
    ("phi",),
    read,
    reads=frozenset(
        """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
        layer_norm_eps max_position_embeddings tie_word_embeddings hidden_act qk_layernorm resid_pdrop embd_pdrop
        attention_dropout""".split()
    ),
    partial=0.5,
    files=FileNames(prefix="model."),
    published=("phi-1.5", "phi-2"),
)
