"""LFM2 (LFM2-350M to 2.6B): gated short convolutions in most layers, attention with norms on q and k in the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, fused, gated_mlp, grouped_attention, llama_ends
from megalora.models.recurrent import GatedConvolution
from megalora.models.spec import Attention, Layer, Linear, Mixer, ModelSpec, Norm, Residual


def norm(hf: Fields, name: str, size: int | None = None) -> Norm:
    """Return an RMSNorm of LFM2."""
    return Norm(name, size or hf.hidden_size, hf.norm_eps)


def dense_mlp(hf: Fields, inner: int) -> Mixer:
    """Return LFM2's MLP."""
    return gated_mlp(hf, at="feed_forward", inner=inner, names=("w1", "w3", "w2"))


def decoder_of(hf: Fields, convolves: tuple[bool, ...], mlp: Callable[[int], Mixer]) -> ModelSpec:
    """Return a decoder of LFM2's layers. convolves: whether each has a convolution; mlp: of each."""
    attention, convolution = _attention(hf), _convolution(hf)

    def layer(index: int) -> Layer:
        mixer = convolution if convolves[index] else attention
        return (Residual(mixer, norm(hf, "operator_norm")), Residual(mlp(index), norm(hf, "ffn_norm")))

    if all(convolves):
        hf.fail("no layer has attention, which is not implemented", "take a model with both kinds of layers")
    return llama_ends(hf, layer, norm(hf, "model.embedding_norm"))


def convolving(hf: Fields) -> tuple[bool, ...]:
    """Return whether each layer has a convolution, by layer_types. Raises UserError for other kinds of layers."""
    kinds = hf.layer_types
    if len(kinds or ()) != hf.num_hidden_layers:
        hf.fail(f"layer_types has {len(kinds or ())} entries for {hf.num_hidden_layers} layers", "correct it")
    for kind in kinds:
        if kind not in ("full_attention", "conv"):
            hf.fail(f"layer_types has {kind!r}, which is not implemented", "take a model with full_attention and conv")
    return tuple(kind == "conv" for kind in kinds)


def _attention(hf: Fields) -> Attention:
    found = grouped_attention(hf)
    out, dim = replace(found.out, name="self_attn.out_proj"), found.head_dim
    q_norm, k_norm = (norm(hf, f"self_attn.{name}_layernorm", dim) for name in "qk")
    return replace(found, out=out, q_norm=q_norm, k_norm=k_norm)


def _convolution(hf: Fields) -> GatedConvolution:
    size, bias = hf.hidden_size, bool(hf.conv_bias)
    made = fused("conv.in_proj", size, tuple((name, size) for name in "bcx"), bias=bias)
    return GatedConvolution(
        made, Linear("conv.out_proj", size, size, bias), size, hf.conv_L_cache, "conv.conv", biased=bias
    )


def read(hf: Fields) -> ModelSpec:
    convolves, indices = convolving(hf), hf.full_attn_idxs
    if indices is not None and convolves != tuple(i not in indices for i in range(len(convolves))):
        hf.fail("layer_types is not what full_attn_idxs says", "keep one of them")
    mlp = dense_mlp(hf, _inner(hf))
    return decoder_of(hf, convolves, lambda layer: mlp)


def _inner(hf: Fields) -> int:
    """Return the features between, as transformers adjusts them."""
    inner, multiple = hf.intermediate_size, hf.block_multiple_of
    if not hf.block_auto_adjust_ff_dim:
        return inner
    inner = int(2 * inner / 3)
    inner = inner if hf.block_ffn_dim_multiplier is None else int(hf.block_ffn_dim_multiplier * inner)
    return -(-inner // multiple) * multiple


FIELDS = (LLAMA_FIELDS - {"rms_norm_eps"}) | {"norm_eps", "conv_bias", "conv_L_cache", "layer_types"}
FAMILY = Family(
    ("lfm2",),
    read,
    reads=FIELDS | {"full_attn_idxs", "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"},
    fixed={"block_use_swiglu": True, "use_pos_enc": True},
    # How weights were drawn before they were trained.
    harmless=frozenset(
        """block_use_xavier_init block_mlp_init_scale block_out_init_scale conv_use_xavier_init""".split()
    ),
    theta=1e6,
    files=LLAMA_FILES,
    aliases={
        "block_ff_dim": "intermediate_size",
        "tie_embedding": "tie_word_embeddings",
        "block_dim": "hidden_size",
        "conv_dim": "hidden_size",
        "conv_dim_out": "hidden_size",
        "num_heads": "num_attention_heads",
        "block_norm_eps": "norm_eps",
    },
    example={
        "layer_types": ["conv", "conv", "full_attention", "conv"] * 8,
        "full_attn_idxs": list(range(2, 32, 4)),
    },
    optional=frozenset({"full_attn_idxs", "block_ffn_dim_multiplier"}),
    published=("LFM2-350M", "LFM2-700M", "LFM2-1.2B", "LFM2-2.6B"),
)
