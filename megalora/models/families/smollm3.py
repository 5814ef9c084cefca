"""SmolLM3: llama without positions on every fourth layer; windows where the config asks for them."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    gated_mlp,
    grouped_attention,
    layer_windows,
    llama_like,
)
from megalora.models.spec import Attention, ModelSpec


def read(hf: Fields) -> ModelSpec:
    rotates, bias = hf.no_rope_layers, hf.attention_bias
    if len(rotates) != hf.num_hidden_layers:
        hf.fail(f"no_rope_layers has {len(rotates)} entries for {hf.num_hidden_layers} layers", "correct it")
    window = layer_windows(hf) if hf.use_sliding_window else (None,) * hf.num_hidden_layers

    def attention(index: int) -> Attention:
        return grouped_attention(hf, bias=bias, out_bias=bias, window=window[index], rotates=bool(rotates[index]))

    return llama_like(hf, attention, gated_mlp(hf, hf.mlp_bias))


FAMILY = Family(
    ("smollm3",),
    read,
    reads=LLAMA_FIELDS - {"head_dim"}
    | {"attention_bias", "mlp_bias", "no_rope_layers", "layer_types", "sliding_window", "use_sliding_window"},
    fixed=LLAMA_FIXED,
    harmless=frozenset({"no_rope_layer_interval", "max_window_layers"}),  # no_rope_layers and layer_types say it
    theta=2e6,
    files=LLAMA_FILES,
    published=("SmolLM3-3B",),
)
