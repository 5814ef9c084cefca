"""Gemma 2: Gemma with norms before and behind each block, softcaps, and a sliding window on every other layer."""

from megalora.models.families.gemma import norm
from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    gated_mlp,
    grouped_attention,
    layer_windows,
    llama_ends,
    scaled_ends,
)
from megalora.models.spec import Layer, ModelSpec, Residual


def read(hf: Fields, qk_norm: bool = False, behind: bool = True) -> ModelSpec:
    """Return the spec. qk_norm: with norms on q and k; behind: with norms behind attention and MLP too."""
    window, bias = layer_windows(hf), hf.attention_bias
    mlp = gated_mlp(hf, act=hf.activation_of("hidden_activation"))
    more = {"scale": hf.query_pre_attn_scalar**-0.5, "softcap": hf.attn_logit_softcapping}
    if qk_norm:
        more |= {f"{name}_norm": norm(hf, f"self_attn.{name}_norm", hf.head_dim) for name in "qk"}

    def layer(index: int) -> Layer:
        attention = grouped_attention(hf, bias=bias, out_bias=bias, window=window[index], **more)
        after = [norm(hf, f"post_{name}_layernorm") if behind else None for name in ("attention", "feedforward")]
        return (
            Residual(attention, norm(hf, "input_layernorm"), after[0]),
            Residual(mlp, norm(hf, "pre_feedforward_layernorm"), after[1]),
        )

    spec = llama_ends(hf, layer, norm(hf, "model.norm"))
    return scaled_ends(spec, embedding=hf.hidden_size**0.5, rounded=True, softcap=hf.final_logit_softcapping)


FIELDS = LLAMA_FIELDS | frozenset(
    """attention_bias hidden_activation layer_types sliding_window query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping""".split()
)
FIXED = {"attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": False}
FAMILY = Family(
    ("gemma2",), read, reads=FIELDS, fixed=FIXED, harmless=frozenset({"cache_implementation"}), files=LLAMA_FILES,
    published=("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"),
)
