"""ELECTRA: BERT's mathematics; a narrow embedding is projected behind its norm."""

from megalora.models.encoders import (
    BERT_CLASSES,
    BERT_FIELDS,
    BERT_FIXED,
    encoder,
    encoder_files,
    token_head,
    two_linear_head,
)
from megalora.models.family import Family, Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return encoder(hf, "electra", (token_head(hf), two_linear_head(hf, "gelu")), width=hf.embedding_size)


FAMILY = Family(
    ("electra",),
    read,
    reads=BERT_FIELDS | {"embedding_size"},
    fixed=BERT_FIXED,
    harmless=frozenset(
        """summary_type summary_use_proj summary_activation summary_last_dropout gradient_checkpointing
        tie_word_embeddings""".split()
    ),
    rotates=False,
    generates=False,
    files=encoder_files("electra", "discriminator_predictions.", "generator_predictions.", "generator_lm_head."),
    architectures=BERT_CLASSES,
)
