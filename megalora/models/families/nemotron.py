"""Nemotron-4 and Minitron: LayerNorm with 1 + w, a plain MLP with squared relu, half of each head rotates."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, grouped_attention, llama_ends
from megalora.models.spec import MLP, Layer, Linear, ModelSpec, Norm, Residual


def read(hf: Fields) -> ModelSpec:
    size, inner, bias = hf.hidden_size, hf.intermediate_size, hf.mlp_bias
    attention = grouped_attention(hf, bias=hf.attention_bias, out_bias=hf.attention_bias)
    up, down = Linear("mlp.up_proj", size, inner, bias), Linear("mlp.down_proj", inner, size, bias)
    mlp = MLP(up, down, inner, hf.activation_of("hidden_act"))

    def norm(name: str) -> Norm:
        return Norm(name, size, hf.norm_eps, "layer", bias=True, offset=True)

    def layer(index: int) -> Layer:
        return (Residual(attention, norm("input_layernorm")), Residual(mlp, norm("post_attention_layernorm")))

    return llama_ends(hf, layer, norm("model.norm"))


FAMILY = Family(
    ("nemotron",),
    read,
    reads=LLAMA_FIELDS - {"rms_norm_eps"} | {"norm_eps", "hidden_act", "attention_bias", "mlp_bias"},
    fixed={"attention_dropout": 0.0},
    rope={"rope_percent": "partial_rotary_factor", "rope_percentage": "partial_rotary_factor"},
    partial=0.5,
    files=LLAMA_FILES,
    published=("Minitron-4B-Base",),
)
