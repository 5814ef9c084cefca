"""Parts of specs that BERT and its kin share: every token sees its whole document, and each sum is normed behind."""

from __future__ import annotations

from megalora.models.family import Fields
from megalora.models.parts import CLASSES, head_dim, layer_norms, plain_mlp
from megalora.models.spec import (
    BUFFERS,
    Attention,
    ClassHead,
    Embedding,
    FileNames,
    Linear,
    ModelSpec,
    Positions,
    Residual,
    Stack,
    TaskHead,
)

BERT_FIELDS = frozenset(
    """hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size layer_norm_eps hidden_act
    max_position_embeddings type_vocab_size hidden_dropout_prob attention_probs_dropout_prob
    classifier_dropout""".split()
)
BERT_FIXED = {"is_decoder": False, "position_embedding_type": "absolute"}
BERT_CLASSES = frozenset({"Model", "ForMaskedLM", "ForPreTraining", "ForQuestionAnswering", "ForMultipleChoice"})


def encoder(
    hf: Fields,
    prefix: str,
    heads: tuple[TaskHead, ...],
    *,
    offset: int = 0,
    width: int | None = None,
    attention: Attention | None = None,
    positions: bool = True,
    attention_norm: str = "attention.output.LayerNorm",
) -> ModelSpec:
    """Return an encoder with BERT's names below `prefix`.

    heads      for its tasks, the first of which it has until a task is chosen
    offset     the row of the first position
    width      of the embedding, where it is projected to hidden_size behind its norm
    attention  of every layer; None: BERT's
    positions  the embedding has learned ones
    attention_norm  name of the norm behind the sum with attention
    """
    if offset >= hf.max_position_embeddings:
        what = f"pad_token_id ({offset - 1}) leaves no row of max_position_embeddings ({hf.max_position_embeddings})"
        hf.fail(f"{what}: positions begin behind it", "take config.json from the model's own folder")
    at, width = f"{prefix}.embeddings", width or hf.hidden_size
    narrow, types = width != hf.hidden_size, hf.type_vocab_size if hf.reads("type_vocab_size") else 0
    embedding = Embedding(
        f"{at}.word_embeddings",
        hf.vocab_size,
        hf.hidden_size,
        positions=Positions(f"{at}.position_embeddings", hf.max_position_embeddings, offset) if positions else None,
        types=Positions(f"{at}.token_type_embeddings", types) if types else None,
        norm=layer_norms(width, hf.layer_norm_eps)(f"{at}.LayerNorm"),
        project=Linear(f"{prefix}.embeddings_project", width, hf.hidden_size, bias=True) if narrow else None,
        projects_last=narrow,
        dropout=hf.hidden_dropout_prob,
    )
    layer = _layer(hf, attention or _attention(hf), attention_norm)
    stack = Stack(f"{prefix}.encoder.layer", (layer,) * hf.num_hidden_layers, None)
    return ModelSpec(embedding, stack, heads[0].head, hf.max_position_embeddings - offset, task_heads=heads)


def _attention(hf: Fields) -> Attention:
    size, heads, dropout = hf.hidden_size, hf.num_attention_heads, hf.attention_probs_dropout_prob
    q, k, v = (Linear(f"attention.self.{name}", size, size, True) for name in ("query", "key", "value"))
    out = Linear("attention.output.dense", size, size, True)
    return Attention(q, k, v, out, heads, heads, head_dim(hf), None, causal=False, dropout=dropout)


def _layer(hf: Fields, attention: Attention, attention_norm: str) -> tuple[Residual, Residual]:
    dropout, norm = hf.hidden_dropout_prob, layer_norms(hf.hidden_size, hf.layer_norm_eps)
    mlp = plain_mlp(hf, "intermediate.dense", "output.dense", hf.intermediate_size, "hidden_act", bias=True)
    return (
        Residual(attention, None, post_norm=norm(attention_norm), dropout=dropout),
        Residual(mlp, None, post_norm=norm("output.LayerNorm"), dropout=dropout),
    )


def head_dropout(hf: Fields) -> float:
    """Return the dropout of a classifier's head: that of the base, unless the config has one for it."""
    own = hf.classifier_dropout if hf.reads("classifier_dropout") else None
    return hf.hidden_dropout_prob if own is None else own


def token_head(hf: Fields, dropout: float | None = None) -> TaskHead:
    """Return the head of every encoder for token classification."""
    out = Linear("classifier", hf.hidden_size, CLASSES, bias=True)
    return TaskHead("TOKEN_CLS", ClassHead(out, head_dropout(hf) if dropout is None else dropout))


def pooled_head(hf: Fields, prefix: str, dropout: float | None = None) -> TaskHead:
    """Return BERT's head for texts: the pooler of the base, which stays frozen, and a linear."""
    dense = Linear(f"{prefix}.pooler.dense", hf.hidden_size, hf.hidden_size, bias=True)
    dropout = head_dropout(hf) if dropout is None else dropout
    return TaskHead("SEQ_CLS", ClassHead(token_head(hf).head.out, dropout, dense))


def two_linear_head(hf: Fields, act: str) -> TaskHead:
    """Return the head for texts of RoBERTa and ELECTRA: two linears that are trained."""
    size, dropout = hf.hidden_size, head_dropout(hf)
    dense = Linear("classifier.dense", size, size, bias=True)
    out = Linear("classifier.out_proj", size, CLASSES, bias=True)
    return TaskHead("SEQ_CLS", ClassHead(out, dropout, dense, act, dropout, trains_dense=True))


def encoder_files(prefix: str, *heads: str) -> FileNames:
    """Return how names in the files of an encoder may differ; heads: starts of the names of pretraining heads."""
    return FileNames(
        ignored=(*BUFFERS, "embeddings.position_ids", "embeddings.token_type_ids"),
        prefix=f"{prefix}.",
        passed=(f"{prefix}.pooler.", "pooler.", *heads),
        endings=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    )
