"""OLMo: llama with LayerNorm that has no weights, and q, k and v clipped where the config asks for it."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, gated_mlp, grouped_attention, llama_ends
from megalora.models.spec import Layer, ModelSpec, Norm, Residual


def read(hf: Fields) -> ModelSpec:
    bias = hf.attention_bias
    attention, mlp = grouped_attention(hf, bias=bias, out_bias=bias, clip=hf.clip_qkv), gated_mlp(hf)

    def norm(name: str) -> Norm:
        return Norm(name, hf.hidden_size, 1e-5, "layer", weighted=False)

    def layer(index: int) -> Layer:
        return (Residual(attention, norm("input_layernorm")), Residual(mlp, norm("post_attention_layernorm")))

    return llama_ends(hf, layer, norm("model.norm"))


FAMILY = Family(
    ("olmo",),
    read,
    reads=LLAMA_FIELDS - {"rms_norm_eps", "head_dim"} | {"attention_bias", "clip_qkv"},
    fixed=LLAMA_FIXED,
    files=LLAMA_FILES,
    published=("OLMo-1B-hf", "OLMo-7B-hf"),
)
