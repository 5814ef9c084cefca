"""Parts of specs that the versions of DeBERTa share: attention whose scores know positions apart from content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megalora.models.encoders import BERT_CLASSES, BERT_FIELDS, encoder, encoder_files, token_head
from megalora.models.family import Family, Fields
from megalora.models.parts import head_dim
from megalora.models.spec import Attention, ClassHead, Disentangled, Linear, ModelSpec, TaskHead

_FIELDS = (BERT_FIELDS - {"classifier_dropout"}) | frozenset(
    """relative_attention max_relative_positions pos_att_type position_biased_input pooler_dropout pooler_hidden_act
    pooler_hidden_size cls_dropout embedding_size attention_head_size""".split()
)
_OPTIONAL = frozenset("pos_att_type pooler_hidden_size cls_dropout embedding_size attention_head_size".split())
_FIXED = {"is_decoder": False, "talking_head": False}
_HARMLESS = frozenset("gradient_checkpointing legacy padding_idx tie_word_embeddings".split())
_FILES = replace(
    encoder_files("deberta", "cls.", "lm_predictions.", "mask_predictions."),
    ignored=(
        *encoder_files("deberta").ignored,
        "embeddings.position_embeddings.weight",  # of models whose config does not add it
        "encoder.LayerNorm.weight",
        "encoder.LayerNorm.bias",
    ),
)
_TERMS = ("c2p", "p2c")  # content to position, position to content


def deberta_family(kind: str, read: Callable[[Fields], ModelSpec], example: dict[str, Any]) -> Family:
    """Return the family of a model_type, with the fields that all versions have."""
    return Family(
        (kind,),
        read,
        reads=_FIELDS,
        fixed=_FIXED,
        harmless=_HARMLESS,
        rotates=False,
        generates=False,
        optional=_OPTIONAL,
        files=_FILES,
        example=example,
        architectures=BERT_CLASSES,
    )


def deberta(hf: Fields, attention: Callable[[tuple[str, ...]], Attention]) -> ModelSpec:
    """Return the model. attention: of every layer, from the terms of its scores that know positions."""
    size, heads = hf.hidden_size, hf.num_attention_heads
    if size % heads:
        hf.fail(f"hidden_size ({size}) is not a multiple of num_attention_heads ({heads})", "correct it")
    sizes = {"embedding_size": size, "pooler_hidden_size": size, "attention_head_size": size // heads}
    for name, needed in sizes.items():
        if getattr(hf, name) not in (None, needed):
            hf.fail(f"{name} = {getattr(hf, name)} is not implemented", f"take a model with {name} = {needed}")
    terms = hf.pos_att_type or ()
    terms = tuple(term.strip() for term in terms.lower().split("|")) if isinstance(terms, str) else tuple(terms)
    if len(set(terms)) != len(terms) or not set(terms) <= set(_TERMS):
        hf.fail(f"pos_att_type = {list(terms)} is not implemented", "take a model with p2c, c2p or both")
    tasks = (token_head(hf, hf.hidden_dropout_prob), _pooled(hf))
    return encoder(hf, "deberta", tasks, attention=attention(terms), positions=hf.position_biased_input)


def _pooled(hf: Fields) -> TaskHead:
    """Return the head for texts: a pooler that the base lacks, so that it is trained, and a linear."""
    dense = Linear("pooler.dense", hf.hidden_size, hf.hidden_size, bias=True)
    dropout = hf.hidden_dropout_prob if hf.cls_dropout is None else hf.cls_dropout
    act, out = hf.activation_of("pooler_hidden_act"), token_head(hf, dropout).head.out
    return TaskHead("SEQ_CLS", ClassHead(out, dropout, dense, act, hf.pooler_dropout, trains_dense=True))


def furthest(hf: Fields) -> int:
    """Return max_relative_positions, where it is not positive max_position_embeddings."""
    own = hf.max_relative_positions
    return own if own > 0 else hf.max_position_embeddings


def disentangled(
    hf: Fields, terms: tuple[str, ...], key: Linear, query: Linear, span: int, **more: object
) -> Disentangled | None:
    """Return how scores know positions; None where relative_attention is false or there are no such terms.

    key, query  of the position's row; span, more: further fields
    """
    if not (hf.relative_attention and terms):
        return None
    of_terms = (key if "c2p" in terms else None, query if "p2c" in terms else None)
    table = "deberta.encoder.rel_embeddings"
    return Disentangled(table, hf.hidden_size, span, *of_terms, dropout=hf.hidden_dropout_prob, **more)  # type: ignore[arg-type]


def scale(hf: Fields, terms: tuple[str, ...]) -> float:
    """Return what scores are multiplied by: each term counts as one more product."""
    return (head_dim(hf) * (1 + len(terms))) ** -0.5
