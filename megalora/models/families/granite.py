"""Granite 3 dense: llama with four multipliers, of the embedding, the scores, what a block adds, and the logits."""

from collections.abc import Callable
from typing import Any

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    gated_mlp,
    grouped_attention,
    llama_ends,
    rms,
    scaled_ends,
)
from megalora.models.spec import Attention, Layer, Mixer, ModelSpec, Norm, Residual


def attention_of(hf: Fields, **more: Any) -> Attention:
    """Return Granite's attention. more: as `grouped_attention` takes it."""
    bias = hf.attention_bias
    return grouped_attention(
        hf, bias=bias, out_bias=bias, scale=hf.attention_multiplier, dropout=hf.attention_dropout, **more
    )


def decoder_of(
    hf: Fields,
    mlp: Mixer,
    logits: float,
    behind: tuple[Norm | None, Norm | None] = (None, None),
    attention: Callable[[int], Mixer] | None = None,
) -> ModelSpec:
    """Return a decoder of Granite's layers around an MLP, or experts.

    logits     what they are multiplied by
    behind     norms behind attention and MLP
    attention  of each layer, or what it has instead; None: Granite's
    """
    scale, plain = hf.residual_multiplier, attention_of(hf)

    def layer(index: int) -> Layer:
        own = plain if attention is None else attention(index)
        return (
            Residual(own, rms(hf, "input_layernorm"), behind[0], scale=scale),
            Residual(mlp, rms(hf, "post_attention_layernorm"), behind[1], scale=scale),
        )

    spec = llama_ends(hf, layer, rms(hf, "model.norm"))
    return scaled_ends(spec, embedding=hf.embedding_multiplier, logits=logits)


def read(hf: Fields) -> ModelSpec:
    return decoder_of(hf, gated_mlp(hf, hf.mlp_bias), 1 / hf.logits_scaling)


FIELDS = LLAMA_FIELDS | frozenset(
    """attention_bias attention_dropout mlp_bias embedding_multiplier attention_multiplier residual_multiplier
    logits_scaling""".split()
)
FAMILY = Family(
    ("granite",), read, reads=FIELDS - {"head_dim"}, fixed={"hidden_act": "silu"}, files=LLAMA_FILES,
    published=("granite-3.1-8b-base", "granite-3.1-2b-base"),
)
