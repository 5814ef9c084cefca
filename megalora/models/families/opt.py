"""OPT and Galactica: learned positions from row 2 on; OPT-350M has narrow embeddings and its norms behind the sum."""

from megalora.models.family import Family, Fields
from megalora.models.parts import decoder_heads, head_dim, layer_norms, plain_mlp
from megalora.models.spec import (
    Attention,
    Embedding,
    FileNames,
    Head,
    Linear,
    Mixer,
    ModelSpec,
    Positions,
    Residual,
    Stack,
)

_OFFSET = 2


def read(hf: Fields) -> ModelSpec:
    size, heads, bias, before = hf.hidden_size, hf.num_attention_heads, hf.enable_bias, hf.do_layer_norm_before
    norm, words = layer_norms(size, 1e-5), hf.word_embed_proj_dim or size
    q, k, v, out = (Linear(f"self_attn.{x}_proj", size, size, bias) for x in ("q", "k", "v", "out"))
    attention = Attention(q, k, v, out, heads, heads, head_dim(hf), None, dropout=hf.attention_dropout)
    mlp = plain_mlp(hf, "fc1", "fc2", hf.ffn_dim, "activation_function", bias=bias)

    def step(mixer: Mixer, name: str) -> Residual:
        if before:
            return Residual(mixer, norm(name), dropout=hf.dropout)
        return Residual(mixer, None, post_norm=norm(name), dropout=hf.dropout)

    layer = (step(attention, "self_attn_layer_norm"), step(mlp, "final_layer_norm"))
    at, narrow = "model.decoder", words != size
    project_out = Linear(f"{at}.project_out", size, words) if narrow else None
    last = norm(f"{at}.final_layer_norm") if before and not hf._remove_final_layer_norm else None
    return ModelSpec(
        Embedding(
            f"{at}.embed_tokens", hf.vocab_size, size,
            positions=Positions(f"{at}.embed_positions", hf.max_position_embeddings + _OFFSET, _OFFSET),
            project=Linear(f"{at}.project_in", words, size) if narrow else None,
        ),
        Stack(f"{at}.layers", (layer,) * hf.num_hidden_layers, last),
        Head("lm_head", bool(hf.tie_word_embeddings), project=project_out),
        hf.max_position_embeddings,
        task_heads=decoder_heads(hf),
    )  # fmt: skip


FAMILY = Family(
    ("opt",),
    read,
    reads=frozenset(
        """hidden_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings ffn_dim enable_bias
        do_layer_norm_before word_embed_proj_dim activation_function tie_word_embeddings dropout attention_dropout
        _remove_final_layer_norm""".split()
    ),
    fixed={"layerdrop": 0.0, "layer_norm_elementwise_affine": True, "activation_dropout": 0.0},
    harmless=frozenset({"init_std", "output_projection", "learned_embeddings"}),
    files=FileNames((("decoder.", "model.decoder."),), prefix="model."),
    rotates=False,
    published=("opt-125m", "opt-350m", "opt-1.3b", "opt-6.7b", "opt-30b"),
)
