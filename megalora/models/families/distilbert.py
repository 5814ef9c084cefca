"""DistilBERT: BERT's mathematics without kinds of texts; a text is read through a linear of the classifier's own."""

from megalora.models.encoders import BERT_CLASSES, encoder_files
from megalora.models.family import Family, Fields
from megalora.models.parts import CLASSES, head_dim, layer_norms, plain_mlp
from megalora.models.spec import (
    Attention,
    ClassHead,
    Embedding,
    Linear,
    ModelSpec,
    Positions,
    Residual,
    Stack,
    TaskHead,
)


def read(hf: Fields) -> ModelSpec:
    size, at, norm = hf.hidden_size, "distilbert.embeddings", layer_norms(hf.hidden_size, 1e-12)
    if size % hf.num_attention_heads:
        hf.fail(f"n_heads ({hf.num_attention_heads}) does not divide dim ({size})", "correct it")
    embedding = Embedding(
        f"{at}.word_embeddings",
        hf.vocab_size,
        size,
        positions=Positions(f"{at}.position_embeddings", hf.max_position_embeddings),
        norm=norm(f"{at}.LayerNorm"),
        dropout=hf.dropout,
    )
    q, k, v, out = (Linear(f"attention.{name}_lin", size, size, True) for name in ("q", "k", "v", "out"))
    heads, within = hf.num_attention_heads, hf.attention_dropout
    attention = Attention(q, k, v, out, heads, heads, head_dim(hf), None, causal=False, dropout=within)
    mlp = plain_mlp(hf, "ffn.lin1", "ffn.lin2", hf.hidden_dim, "activation")
    layer = (
        Residual(attention, None, post_norm=norm("sa_layer_norm")),
        Residual(mlp, None, post_norm=norm("output_layer_norm"), dropout=hf.dropout),
    )
    stack = Stack("distilbert.transformer.layer", (layer,) * hf.num_hidden_layers, None)
    tasks = _heads(hf)
    return ModelSpec(embedding, stack, tasks[0].head, hf.max_position_embeddings, task_heads=tasks)


def _heads(hf: Fields) -> tuple[TaskHead, TaskHead]:
    """Return the head for words, and that for texts, whose first linear no base model has: it is trained."""
    size = hf.hidden_size
    out, dense = Linear("classifier", size, CLASSES, bias=True), Linear("pre_classifier", size, size, bias=True)
    text = ClassHead(out, hf.seq_classif_dropout, dense, "relu", trains_dense=True)
    return TaskHead("TOKEN_CLS", ClassHead(out, hf.dropout)), TaskHead("SEQ_CLS", text)


FAMILY = Family(
    ("distilbert",),
    read,
    reads=frozenset(
        """hidden_size hidden_dim num_hidden_layers num_attention_heads vocab_size max_position_embeddings activation
        dropout attention_dropout seq_classif_dropout""".split()
    ),
    # Such positions are in the file like learned ones.
    harmless=frozenset({"sinusoidal_pos_embds", "output_past", "qa_dropout", "tie_weights_", "tie_word_embeddings"}),
    rotates=False,
    generates=False,
    files=encoder_files("distilbert", "vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    architectures=BERT_CLASSES,
    published=("distilbert-base-uncased", "distilbert-base-multilingual-cased"),
)
