"""InternLM3: llama whose biases on q, k, v and on the other linears are asked for apart."""

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, gated_mlp, grouped_attention, llama_like
from megalora.models.spec import ModelSpec

_DEFAULTS = {
    "vocab_size": 128512, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "qkv_bias": False, "bias": False, "classifier_dropout": None,
}  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, bias=bool(hf.qkv_bias), out_bias=bool(hf.bias))
    return llama_like(hf, lambda layer: attention, gated_mlp(hf, bool(hf.bias)))


FAMILY = Family(
    ("internlm3",),
    read,
    reads=LLAMA_FIELDS | {"qkv_bias", "bias"},
    fixed=LLAMA_FIXED,
    aliases={"attention_bias": "qkv_bias", "mlp_bias": "bias"},  # as transformers calls them
    defaults=_DEFAULTS,
    remote=True,
    files=LLAMA_FILES,
    published=("internlm3-8b-instruct",),
)
