"""EXAONE 4: norms behind each block, RMSNorm on each head, rotations only on layers whose window slides."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    gated_mlp,
    grouped_attention,
    layer_windows,
    llama_ends,
    rms,
)
from megalora.models.spec import Layer, ModelSpec, Residual


def read(hf: Fields) -> ModelSpec:
    window, mlp = layer_windows(hf), gated_mlp(hf)
    everywhere = hf.sliding_window is None

    def layer(index: int) -> Layer:
        rotates = everywhere or window[index] is not None
        attention = grouped_attention(hf, window=window[index], qk_norm=True, rotates=rotates)
        return (
            Residual(attention, None, rms(hf, "post_attention_layernorm")),
            Residual(mlp, None, rms(hf, "post_feedforward_layernorm")),
        )

    return llama_ends(hf, layer, rms(hf, "model.norm"))


FAMILY = Family(
    ("exaone4",),
    read,
    reads=LLAMA_FIELDS | {"layer_types", "sliding_window"},
    fixed=LLAMA_FIXED,
    harmless=frozenset({"sliding_window_pattern"}),  # layer_types says which layers slide
    files=LLAMA_FILES,
    published=("EXAONE-4.0-1.2B",),
)
