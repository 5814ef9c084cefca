"""Jais 2: llama with LayerNorm, biases, and a plain MLP with squared relu."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, grouped_attention, layer_norms, llama_ends, plain_mlp
from megalora.models.spec import Layer, ModelSpec, Residual


def read(hf: Fields) -> ModelSpec:
    bias, norm = bool(hf.attention_bias), layer_norms(hf.hidden_size, hf.layer_norm_eps)
    attention = grouped_attention(hf, bias=bias, out_bias=bias)
    mlp = plain_mlp(hf, "mlp.up_proj", "mlp.down_proj", hf.intermediate_size, "hidden_act", bias=bool(hf.mlp_bias))

    def layer(index: int) -> Layer:
        return (Residual(attention, norm("input_layernorm")), Residual(mlp, norm("post_attention_layernorm")))

    return llama_ends(hf, layer, norm("model.norm"))


FAMILY = Family(
    ("jais2",),
    read,
    reads=LLAMA_FIELDS - {"rms_norm_eps"} | {"layer_norm_eps", "hidden_act", "attention_bias", "mlp_bias"},
    fixed={"attention_dropout": 0.0},
    files=LLAMA_FILES,
)
