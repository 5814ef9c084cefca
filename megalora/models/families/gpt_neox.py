"""GPT-NeoX and Pythia: LayerNorm, attention and MLP side by side, a part of each head rotates, q k v fused by heads."""

from megalora.models.family import Family, Fields
from megalora.models.parts import decoder
from megalora.models.spec import (
    BUFFERS,
    MLP,
    Attention,
    ByHead,
    FileNames,
    Fused,
    Linear,
    ModelSpec,
    Norm,
    ParallelResidual,
    Residual,
    Stack,
)


def read(hf: Fields) -> ModelSpec:
    size, heads, inner = hf.hidden_size, hf.num_attention_heads, hf.intermediate_size
    dim = size // heads

    def norm(name: str) -> Norm:
        return Norm(name, size, hf.layer_norm_eps, "layer", bias=True)

    qkv = Fused(Linear("attention.query_key_value", size, 3 * size, hf.attention_bias), ByHead(dim))
    out = Linear("attention.dense", size, size, hf.attention_bias)
    attention = Attention(qkv, qkv, qkv, out, heads, heads, dim, hf.rotary(dim), dropout=hf.attention_dropout)
    up, down = Linear("mlp.dense_h_to_4h", size, inner, True), Linear("mlp.dense_4h_to_h", inner, size, True)
    mlp = MLP(up, down, inner, hf.activation_of("hidden_act"))
    steps = tuple(
        Residual(mixer, norm(f"{name}_layernorm"), dropout=hf.hidden_dropout)
        for mixer, name in ((attention, "input"), (mlp, "post_attention"))
    )
    layer = (ParallelResidual(steps),) if hf.use_parallel_residual else steps
    stack = Stack("gpt_neox.layers", (layer,) * hf.num_hidden_layers, norm("gpt_neox.final_layer_norm"))
    return decoder(
        hf, stack, embedding="gpt_neox.embed_in", head="embed_out", token_head="classifier", dropout=hf.hidden_dropout
    )


FAMILY = Family(
    ("gpt_neox",),
    read,
    reads=frozenset(
        """hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size layer_norm_eps hidden_act
        max_position_embeddings tie_word_embeddings use_parallel_residual attention_bias classifier_dropout
        hidden_dropout attention_dropout""".split()
    ),
    rope={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    partial=0.25,
    files=FileNames((("lm_head.", "embed_out."),), (*BUFFERS, "attention.bias", "attention.masked_bias"), "gpt_neox."),
    published=("pythia-1.4b", "pythia-6.9b", "gpt-neox-20b"),
)
