"""BART: an encoder-decoder with learned positions from row 2 on, whose sums are normed behind."""

from megalora.models.family import Family, Fields
from megalora.models.parts import head_start, layer_norms
from megalora.models.spec import (
    MLP,
    Attention,
    CrossAttention,
    Embedding,
    Encoder,
    FileNames,
    Head,
    Layer,
    Linear,
    Mixer,
    ModelSpec,
    Positions,
    Residual,
    Stack,
)

_OFFSET = 2


def read(hf: Fields) -> ModelSpec:
    size, count = hf.d_model, hf.encoder_layers

    def embedding(stack: str) -> Embedding:
        at = f"model.{stack}"
        return Embedding(
            "model.shared",
            hf.vocab_size,
            size,
            positions=Positions(f"{at}.embed_positions", hf.max_position_embeddings + _OFFSET, _OFFSET),
            norm=layer_norms(size, 1e-5)(f"{at}.layernorm_embedding"),
            scale=size**0.5 if hf.scale_embedding else 1.0,
            dropout=hf.dropout,
        )

    layers = (_layer(hf, "encoder"),) * count + (_layer(hf, "decoder"),) * hf.decoder_layers
    encoder = Encoder("model.encoder.layers", count, embedding("encoder"), None, 0.0, *head_start(hf))
    return ModelSpec(
        embedding("decoder"),
        Stack("model.decoder.layers", layers, None, encoder=encoder),
        Head("lm_head", bool(hf.tie_word_embeddings), bias_row="final_logits_bias"),
        hf.max_position_embeddings,
    )


def _layer(hf: Fields, stack: str) -> Layer:
    """Return a layer of the encoder or the decoder."""
    size, heads, inner = hf.d_model, getattr(hf, f"{stack}_attention_heads"), getattr(hf, f"{stack}_ffn_dim")
    norm, decodes = layer_norms(size, 1e-5), stack == "decoder"
    if size % heads:
        hf.fail(f"{stack}_attention_heads ({heads}) does not divide d_model ({size}): correct it")

    def linears(at: str) -> tuple[Linear, Linear, Linear, Linear]:
        q, k, v, out = (Linear(f"{at}.{name}_proj", size, size, True) for name in ("q", "k", "v", "out"))
        return q, k, v, out

    def step(mixer: Mixer, name: str) -> Residual:
        return Residual(mixer, None, post_norm=norm(name), dropout=hf.dropout)

    dim, within = size // heads, hf.attention_dropout
    attention = Attention(*linears("self_attn"), heads, heads, dim, None, causal=decodes, dropout=within)
    mlp = MLP(
        Linear("fc1", size, inner, True), Linear("fc2", inner, size, True), inner,
        hf.activation_of("activation_function"), dropout=hf.activation_dropout,
    )  # fmt: skip
    own, feed = step(attention, "self_attn_layer_norm"), step(mlp, "final_layer_norm")
    if not decodes:
        return own, feed
    cross = CrossAttention(*linears("encoder_attn"), heads, dim, dropout=within)
    return own, step(cross, "encoder_attn_layer_norm"), feed


FAMILY = Family(
    ("bart",),
    read,
    reads=frozenset(
        """vocab_size d_model max_position_embeddings encoder_layers encoder_ffn_dim encoder_attention_heads
        decoder_layers decoder_ffn_dim decoder_attention_heads activation_function dropout attention_dropout
        activation_dropout scale_embedding tie_word_embeddings decoder_start_token_id pad_token_id
        forced_bos_token_id""".split()
    ),
    fixed={
        "is_encoder_decoder": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "add_bias_logits": False,
        "add_final_layer_norm": False, "normalize_before": False, "normalize_embedding": True,
        "static_position_embeddings": False, "extra_pos_embeddings": 2,
    },
    harmless=frozenset(
        """init_std classifier_dropout classif_dropout gradient_checkpointing num_hidden_layers save_step output_past
        force_bos_token_to_be_generated""".split()
    ),
    rotates=False,
    optional=frozenset({"decoder_start_token_id", "forced_bos_token_id", "pad_token_id"}),
    files=FileNames(
        ignored=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "encoder.version", "decoder.version"),
        prefix="model.",
    ),
    architectures=frozenset({"ForConditionalGeneration", "Model"}),
)  # fmt: skip
