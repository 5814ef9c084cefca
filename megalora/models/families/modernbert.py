"""ModernBERT: pre-norm, rotations that differ by kind of layer, windows that look both ways, a gated MLP."""

from megalora.models.encoders import BERT_CLASSES
from megalora.models.family import Family, Fields
from megalora.models.parts import CLASSES, fused, head_dim, layer_norms, sliding_layers
from megalora.models.spec import (
    MLP,
    Attention,
    ClassHead,
    Embedding,
    FileNames,
    Layer,
    Linear,
    ModelSpec,
    Residual,
    Stack,
    TaskHead,
)

_POOLINGS = ("cls", "mean")


def read(hf: Fields) -> ModelSpec:
    size, norm = hf.hidden_size, layer_norms(hf.hidden_size, hf.norm_eps, hf.norm_bias)
    if hf.rope["rope_type"] != "default":
        hf.fail(f"rope_type = {hf.rope['rope_type']!r} is not implemented", "take a model with default rotations")
    kinds = hf.layer_types  # older files, which say how often one comes, and versions of transformers have none
    if kinds is None:
        every, count = hf.global_attn_every_n_layers or 3, hf.num_hidden_layers
        kinds = ["sliding_attention" if i % every else "full_attention" for i in range(count)]

    def layer(index: int, slides: bool) -> Layer:
        own = norm("attn_norm") if index else None  # the embedding's norm is the first layer's
        return (
            Residual(_attention(hf, slides), own, dropout=hf.attention_dropout),
            Residual(_mlp(hf), norm("mlp_norm")),
        )

    at, layers = "model.embeddings", map(layer, range(hf.num_hidden_layers), sliding_layers(hf, kinds))
    tasks = _heads(hf)
    return ModelSpec(
        Embedding(f"{at}.tok_embeddings", hf.vocab_size, size, norm=norm(f"{at}.norm"), dropout=hf.embedding_dropout),
        Stack("model.layers", tuple(layers), norm("model.final_norm")),
        tasks[0].head,
        hf.max_position_embeddings,
        task_heads=tasks,
    )


def _attention(hf: Fields, slides: bool) -> Attention:
    """Return a layer's attention; slides: a token sees local_attention // 2 tokens on each side of it."""
    size, heads, dim = hf.hidden_size, hf.num_attention_heads, head_dim(hf)
    if size % heads:
        hf.fail(f"num_attention_heads ({heads}) does not divide hidden_size ({size})", "correct it")
    qkv = fused("attn.Wqkv", size, [(name, heads) for name in "qkv"], dim, hf.attention_bias)
    return Attention(
        *(qkv, qkv, qkv, Linear("attn.Wo", size, size, hf.attention_bias), heads, heads, dim),
        hf.rotary(dim, sliding=slides),
        hf.local_attention // 2 + 1 if slides else None,
        causal=False,
        dropout=hf.attention_dropout,
    )


def _mlp(hf: Fields) -> MLP:
    size, inner, bias = hf.hidden_size, hf.intermediate_size, hf.mlp_bias
    up, down = fused("mlp.Wi", size, [("gate", inner), ("up", inner)], bias=bias), Linear("mlp.Wo", inner, size, bias)
    return MLP(up, down, inner, hf.activation_of("hidden_activation"), up, dropout=hf.mlp_dropout)


def _heads(hf: Fields) -> tuple[TaskHead, TaskHead]:
    """Return both heads: what pretraining has before its words, which stays frozen, and a linear."""
    size, pooling = hf.hidden_size, hf.classifier_pooling
    if pooling not in _POOLINGS:
        hf.fail(f"classifier_pooling = {pooling!r} is not implemented", f"take a model with {' or '.join(_POOLINGS)}")
    dense, out = Linear("head.dense", size, size, hf.classifier_bias), Linear("classifier", size, CLASSES, bias=True)
    norm, act = layer_norms(size, hf.norm_eps, hf.norm_bias)("head.norm"), hf.activation_of("classifier_activation")

    def head(means: bool) -> ClassHead:
        return ClassHead(out, hf.classifier_dropout or 0.0, dense, act, norm=norm, means=means)

    return TaskHead("TOKEN_CLS", head(False)), TaskHead("SEQ_CLS", head(pooling == "mean"))


FAMILY = Family(
    ("modernbert",),
    read,
    reads=frozenset(
        """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_activation
        max_position_embeddings norm_eps norm_bias attention_bias attention_dropout layer_types
        global_attn_every_n_layers local_attention embedding_dropout mlp_bias mlp_dropout classifier_pooling
        classifier_dropout classifier_bias classifier_activation""".split()
    ),
    # position_embedding_type and layer_norm_eps stand in published files, and transformers does not read them.
    harmless=frozenset(
        """decoder_bias sparse_prediction sparse_pred_ignore_index tie_word_embeddings initializer_cutoff_factor
        cls_token_id deterministic_flash_attn reference_compile repad_logits_with_grad gradient_checkpointing
        position_embedding_type layer_norm_eps""".split()
    ),
    rope={"global_rope_theta": "rope_theta"},
    theta=160000.0,
    sliding_theta=("local_rope_theta", 10000.0),
    generates=False,
    optional=frozenset({"global_attn_every_n_layers"}),
    files=FileNames(prefix="model.", passed=("decoder.",)),
    architectures=BERT_CLASSES,
    published=("ModernBERT-base", "ModernBERT-large"),
)
