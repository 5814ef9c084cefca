"""GPT-J: attention and MLP side by side behind one LayerNorm, neighbouring features rotate, the LM head has a bias."""

from megalora.models import rotary
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
    ParallelResidual,
    Projection,
    Residual,
    Stack,
)

GPTJ_FIELDS = frozenset(
    """hidden_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings n_inner rotary_dim
    activation_function layer_norm_epsilon tie_word_embeddings attn_pdrop embd_pdrop resid_pdrop""".split()
)
GPTJ_FILES = FileNames((), (*BUFFERS, "attn.bias", "attn.masked_bias", "attn.causal_mask"), "transformer.")
GPTJ_HARMLESS = frozenset(
    """n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout rotary
    scale_attn_weights gradient_checkpointing""".split()
)


def gptj_like(hf: Fields, q: Projection, k: Projection, v: Projection) -> ModelSpec:
    """Return a GPT-J whose queries, keys and values come from these linears."""
    size, heads, dim = hf.hidden_size, hf.num_attention_heads, head_dim(hf)
    norm = layer_norms(size, hf.layer_norm_epsilon)
    position = rotary.plain(hf.rotary_dim, 10000.0, interleaved=True)
    out = Linear("attn.out_proj", size, size)
    attention = Attention(q, k, v, out, heads, heads, dim, position, dropout=hf.attn_pdrop)
    mlp = plain_mlp(hf, "mlp.fc_in", "mlp.fc_out", hf.n_inner or 4 * size, "activation_function")
    branches = tuple(Residual(mixer, norm("ln_1"), dropout=hf.resid_pdrop) for mixer in (attention, mlp))
    layers = ((ParallelResidual(branches),),) * hf.num_hidden_layers
    return ModelSpec(
        Embedding("transformer.wte", hf.vocab_size, size, dropout=hf.embd_pdrop),
        Stack("transformer.h", layers, norm("transformer.ln_f")),
        Head("lm_head", bool(hf.tie_word_embeddings), bias=True),
        hf.max_position_embeddings,
        task_heads=decoder_heads(hf),
    )


def read(hf: Fields) -> ModelSpec:
    return gptj_like(hf, *(Linear(f"attn.{x}_proj", hf.hidden_size, hf.hidden_size) for x in "qkv"))


FAMILY = Family(
    ("gptj",), read, reads=GPTJ_FIELDS, harmless=GPTJ_HARMLESS, files=GPTJ_FILES, rotates=False,
    published=("gpt-j-6b",),
)
