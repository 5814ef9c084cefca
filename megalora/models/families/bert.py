"""BERT and MiniLM: an encoder for classifiers; a text is read through its pooler, which stays frozen."""

from megalora.models.encoders import (
    BERT_CLASSES,
    BERT_FIELDS,
    BERT_FIXED,
    encoder,
    encoder_files,
    pooled_head,
    token_head,
)
from megalora.models.family import Family, Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return encoder(hf, "bert", (token_head(hf), pooled_head(hf, "bert")))


FAMILY = Family(
    ("bert",),
    read,
    reads=BERT_FIELDS,
    fixed=BERT_FIXED,
    harmless=frozenset(
        """gradient_checkpointing directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
        pooler_size_per_head pooler_type tie_word_embeddings""".split()
    ),
    rotates=False,
    generates=False,
    files=encoder_files("bert", "cls."),
    architectures=BERT_CLASSES,
)
