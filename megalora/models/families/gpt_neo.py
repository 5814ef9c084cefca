"""GPT-Neo: learned positions, scores that are not scaled, a window on every second layer."""

from megalora.models.family import Family, Fields
from megalora.models.parts import decoder_heads, head_dim, layer_norms, plain_mlp
from megalora.models.spec import (
    BUFFERS,
    Attention,
    Embedding,
    FileNames,
    Head,
    Linear,
    ModelSpec,
    Positions,
    Residual,
    Stack,
)


def read(hf: Fields) -> ModelSpec:
    size, heads, dim = hf.hidden_size, hf.num_attention_heads, head_dim(hf)
    norm = layer_norms(size, hf.layer_norm_epsilon)
    q, k, v, out = (Linear(f"attn.attention.{x}_proj", size, size, x == "out") for x in ("q", "k", "v", "out"))
    mlp = plain_mlp(hf, "mlp.c_fc", "mlp.c_proj", hf.intermediate_size or 4 * size, "activation_function")

    def layer(index: int) -> tuple[Residual, ...]:
        window = hf.window_size if hf.attention_layers[index] == "local" else None
        attention = Attention(
            q, k, v, out, heads, heads, dim, None, window, scale=1.0, dropout=hf.attention_dropout
        )  # fmt: skip
        return (
            Residual(attention, norm("ln_1"), dropout=hf.resid_dropout),
            Residual(mlp, norm("ln_2"), dropout=hf.resid_dropout),
        )

    positions = Positions("transformer.wpe", hf.max_position_embeddings)
    return ModelSpec(
        Embedding("transformer.wte", hf.vocab_size, size, positions=positions, dropout=hf.embed_dropout),
        Stack("transformer.h", tuple(map(layer, range(hf.num_hidden_layers))), norm("transformer.ln_f")),
        Head("lm_head", bool(hf.tie_word_embeddings)),
        hf.max_position_embeddings,
        task_heads=decoder_heads(hf, "classifier"),
    )


FAMILY = Family(
    ("gpt_neo",),
    read,
    reads=frozenset(
        """hidden_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings intermediate_size
        attention_types attention_layers window_size activation_function layer_norm_epsilon tie_word_embeddings
        attention_dropout embed_dropout resid_dropout classifier_dropout""".split()
    ),
    optional=frozenset({"intermediate_size"}),
    rotates=False,
    harmless=frozenset(
        """summary_type summary_use_proj summary_activation summary_proj_to_labels
        summary_first_dropout gradient_checkpointing""".split()
    ),
    files=FileNames((), (*BUFFERS, "attn.attention.bias", "attn.attention.masked_bias"), "transformer."),
    published=("gpt-neo-125m", "gpt-neo-1.3B", "gpt-neo-2.7B"),
)
