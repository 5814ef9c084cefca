"""LayoutLM: BERT's mathematics, with the places of words on a page beside their order."""

from dataclasses import replace

from megalora.models.encoders import BERT_CLASSES, BERT_FIELDS, BERT_FIXED, encoder, encoder_files, token_head
from megalora.models.family import Family, Fields
from megalora.models.spec import Boxes, ModelSpec

_MOST = 1000  # a coordinate, by the convention of its data: 0 and this are the edges of a page


def read(hf: Fields) -> ModelSpec:
    rows = hf.max_2d_position_embeddings
    if rows <= _MOST:
        told = f"max_2d_position_embeddings ({rows}) is less than {_MOST + 1}"
        hf.fail(f"{told}, and coordinates go from 0 to {_MOST}", "correct it")
    spec = encoder(hf, "layoutlm", (token_head(hf, hf.hidden_dropout_prob),))
    return replace(spec, embedding=replace(spec.embedding, boxes=Boxes("layoutlm.embeddings", rows)))


FAMILY = Family(
    ("layoutlm",),
    read,
    reads=(BERT_FIELDS - {"classifier_dropout"}) | {"max_2d_position_embeddings"},
    fixed=BERT_FIXED,
    harmless=frozenset({"gradient_checkpointing", "output_past", "tie_word_embeddings"}),
    rotates=False,
    generates=False,
    files=encoder_files("layoutlm", "cls."),
    architectures=BERT_CLASSES,
)
