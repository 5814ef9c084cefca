"""StarCoder2: LayerNorm, a plain MLP, biases everywhere, and a sliding window where the config has one."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, grouped_attention, llama_ends
from megalora.models.spec import MLP, Layer, Linear, ModelSpec, Norm, Residual


def read(hf: Fields) -> ModelSpec:
    size, inner, bias = hf.hidden_size, hf.intermediate_size, hf.use_bias
    attention = grouped_attention(
        hf, bias=bias, out_bias=bias, window=hf.sliding_window, dropout=hf.attention_dropout
    )
    up, down = Linear("mlp.c_fc", size, inner, bias), Linear("mlp.c_proj", inner, size, bias)
    mlp = MLP(up, down, inner, hf.activation_of("hidden_act"))

    def norm(name: str) -> Norm:
        return Norm(name, size, hf.norm_epsilon, "layer", bias=True)

    def layer(index: int) -> Layer:
        return (
            Residual(attention, norm("input_layernorm"), dropout=hf.residual_dropout),
            Residual(mlp, norm("post_attention_layernorm"), dropout=hf.residual_dropout),
        )

    return llama_ends(hf, layer, norm("model.norm"), hf.embedding_dropout)


FAMILY = Family(
    ("starcoder2",),
    read,
    reads=LLAMA_FIELDS
    - {"rms_norm_eps", "head_dim"}
    | frozenset(
        """norm_epsilon hidden_act use_bias sliding_window attention_dropout embedding_dropout
        residual_dropout""".split()
    ),
    fixed={"norm_type": "layer_norm", "mlp_type": "default", "scale_attn_weights": True},
    # Of the model from which StarCoder2's code was made: nothing reads them.
    harmless=frozenset(
        {
            "activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
            "layer_norm_epsilon",
        }
    ),  # fmt: skip
    files=LLAMA_FILES,
    published=("starcoder2-3b", "starcoder2-7b", "starcoder2-15b"),
)
