"""Parts of specs that BART and its kin share: encoder-decoders with LayerNorms and positions in the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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

BART_FIELDS = frozenset(
    """vocab_size d_model max_position_embeddings encoder_layers encoder_ffn_dim encoder_attention_heads
    decoder_layers decoder_ffn_dim decoder_attention_heads activation_function dropout attention_dropout
    activation_dropout scale_embedding tie_word_embeddings decoder_start_token_id pad_token_id
    forced_bos_token_id""".split()
)
_HARMLESS = frozenset(
    """init_std classifier_dropout classif_dropout gradient_checkpointing num_hidden_layers save_step output_past
    force_bos_token_to_be_generated""".split()
)
LEARNED_OFFSET = 2  # row of the first position


def bart(
    hf: Fields,
    positions: Callable[[str], Positions],
    *,
    norms_first: bool = True,
    norms_embedding: bool = False,
    bias_row: str | None = "final_logits_bias",
) -> ModelSpec:
    """Return an encoder-decoder with BART's names.

    positions        of a stack, by its name in the file
    norms_first      each mixer reads a norm, and another stands behind the last layer; else sums are normed
    norms_embedding  what enters the first layer is normed
    bias_row         name of the head's bias; None: it has none
    """
    size, count, norm = hf.d_model, hf.encoder_layers, layer_norms(hf.d_model, 1e-5)

    def embedding(stack: str) -> Embedding:
        at = f"model.{stack}"
        return Embedding(
            "model.shared",
            hf.vocab_size,
            size,
            positions=positions(f"{at}.embed_positions"),
            norm=norm(f"{at}.layernorm_embedding") if norms_embedding else None,
            scale=size**0.5 if hf.scale_embedding else 1.0,
            dropout=hf.dropout,
        )

    last = {stack: norm(f"model.{stack}.layer_norm") if norms_first else None for stack in ("encoder", "decoder")}
    layers = (_layer(hf, "encoder", norms_first),) * count
    layers += (_layer(hf, "decoder", norms_first),) * hf.decoder_layers
    encoder = Encoder("model.encoder.layers", count, embedding("encoder"), last["encoder"], 0.0, *head_start(hf))
    return ModelSpec(
        embedding("decoder"),
        Stack("model.decoder.layers", layers, last["decoder"], encoder=encoder),
        Head("lm_head", bool(hf.tie_word_embeddings), bias_row=bias_row),
        hf.max_position_embeddings,
    )


def learned_positions(hf: Fields) -> Callable[[str], Positions]:
    """Return what makes a stack's learned positions by their name."""
    return lambda name: Positions(name, hf.max_position_embeddings + LEARNED_OFFSET, LEARNED_OFFSET)


def _layer(hf: Fields, stack: str, norms_first: bool) -> Layer:
    """Return a layer of the encoder or the decoder."""
    size, heads, inner = hf.d_model, getattr(hf, f"{stack}_attention_heads"), getattr(hf, f"{stack}_ffn_dim")
    norm, decodes = layer_norms(size, 1e-5), stack == "decoder"
    if size % heads:
        hf.fail(f"{stack}_attention_heads ({heads}) does not divide d_model ({size}): correct it")

    def linears(at: str) -> tuple[Linear, Linear, Linear, Linear]:
        q, k, v, out = (Linear(f"{at}.{name}_proj", size, size, True) for name in ("q", "k", "v", "out"))
        return q, k, v, out

    def step(mixer: Mixer, name: str) -> Residual:
        first, behind = (norm(name), None) if norms_first else (None, norm(name))
        return Residual(mixer, first, post_norm=behind, dropout=hf.dropout)

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


def bart_family(
    kind: str,
    read: Callable[[Fields], ModelSpec],
    fixed: Mapping[str, Any],
    *,
    harmless: frozenset[str] = frozenset(),
    ignored: tuple[str, ...] = (),
    example: Mapping[str, Any] | None = None,
    published: tuple[str, ...] = (),
) -> Family:
    """Return the family of a model_type with BART's fields.

    fixed, harmless  beside those of all; ignored: ends of names of tensors that say nothing
    """
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "encoder.version", "decoder.version")
    return Family(
        (kind,),
        read,
        reads=BART_FIELDS,
        fixed={
            "is_encoder_decoder": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "add_bias_logits": False,
            **fixed,
        },
        harmless=_HARMLESS | harmless,
        rotates=False,
        optional=frozenset({"decoder_start_token_id", "forced_bos_token_id", "pad_token_id"}),
        files=FileNames(ignored=(*copies, *ignored), prefix="model."),
        example=example or {},
        architectures=frozenset({"ForConditionalGeneration", "Model"}),
        published=published,
    )  # fmt: skip
