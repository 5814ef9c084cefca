"""ChatGLM2 and ChatGLM3: grouped queries in one linear with biases, half of each head rotates, gate and up fused."""

from dataclasses import replace

from megalora.models import rotary
from megalora.models.family import Family, Fields
from megalora.models.parts import decoder_heads, fused
from megalora.models.spec import MLP, Attention, Embedding, FileNames, Head, Linear, ModelSpec, Norm, Residual, Stack

_DEFAULTS = {
    "hidden_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 32, "padded_vocab_size": 65024,
    "ffn_hidden_size": 13696, "kv_channels": 128, "seq_length": 2048, "layernorm_epsilon": 1e-5, "rmsnorm": True,
    "post_layer_norm": True, "add_bias_linear": False, "add_qkv_bias": False, "multi_query_attention": False,
    "multi_query_group_num": 1, "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "classifier_dropout": None, "tie_word_embeddings": False, "position_encoding_2d": None,
    "rope_ratio": 1,
}  # fmt: skip


def read(hf: Fields) -> ModelSpec:
    if hf.position_encoding_2d is not None:
        hf.fail("this is ChatGLM-1, another model than ChatGLM2 and 3 and not implemented", "take ChatGLM3 or GLM-4")
    size, heads, dim, inner = hf.hidden_size, hf.num_attention_heads, hf.kv_channels, hf.ffn_hidden_size
    kv = hf.multi_query_group_num if hf.multi_query_attention else heads
    if heads % kv:
        hf.fail(f"num_attention_heads ({heads}) is not a multiple of multi_query_group_num ({kv})", "correct it")

    def norm(name: str) -> Norm:
        return Norm(name, size, hf.layernorm_epsilon)

    bias = bool(hf.add_qkv_bias)
    qkv = fused("self_attention.query_key_value", size, (("q", heads), ("k", kv), ("v", kv)), dim, bias)
    out = Linear("self_attention.dense", heads * dim, size)
    position = rotary.plain(dim // 2, 10000.0, interleaved=True)
    attention = Attention(qkv, qkv, qkv, out, heads, kv, dim, position, dropout=hf.attention_dropout)
    gate_up = fused("mlp.dense_h_to_4h", size, (("gate", inner), ("up", inner)))
    mlp = MLP(gate_up, Linear("mlp.dense_4h_to_h", inner, size), inner, "silu", gate_up)
    layer = (
        Residual(attention, norm("input_layernorm"), dropout=hf.hidden_dropout),
        Residual(mlp, norm("post_attention_layernorm"), dropout=hf.hidden_dropout),
    )
    last = norm("transformer.encoder.final_layernorm")
    of_tokens, of_sequence = decoder_heads(hf)
    of_sequence = of_sequence._replace(head=replace(of_sequence.head, dropout=hf.classifier_dropout or 0.0))
    return ModelSpec(
        Embedding("transformer.embedding.word_embeddings", hf.padded_vocab_size, size),
        Stack("transformer.encoder.layers", (layer,) * hf.num_hidden_layers, last),
        Head("transformer.output_layer", bool(hf.tie_word_embeddings)),
        hf.seq_length,
        task_heads=(of_tokens, of_sequence),
    )


FAMILY = Family(
    ("chatglm",),
    read,
    reads=frozenset(_DEFAULTS) - {"rmsnorm", "post_layer_norm", "add_bias_linear", "rope_ratio"}
    - {"apply_residual_connection_post_layernorm"},
    fixed={
        "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False, "rope_ratio": 1, "pre_seq_len": None,
        "apply_residual_connection_post_layernorm": False, "interleaved_qkv": False, "quantization_bit": 0,
    },
    harmless=frozenset(
        """vocab_size apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion
        fp32_residual_connection original_rope prefix_projection""".split()
    ),
    aliases={"num_layers": "num_hidden_layers"},
    defaults=_DEFAULTS,
    remote=True,
    architectures=frozenset({"ChatGLMModel", "ChatGLMForConditionalGeneration"}),
    files=FileNames(ignored=("rotary_pos_emb.inv_freq",)),
    published=("chatglm2-6b", "chatglm3-6b"),
)  # fmt: skip
