"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's mathematics with positions that begin behind the padding token's."""

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
    return encoder(hf, "roberta", (token_head(hf), two_linear_head(hf, "tanh")), offset=hf.pad_token_id + 1)


FAMILY = Family(
    ("roberta", "xlm-roberta", "camembert"),
    read,
    reads=BERT_FIELDS | {"pad_token_id"},
    fixed=BERT_FIXED,
    harmless=frozenset({"gradient_checkpointing", "output_past", "tie_word_embeddings"}),
    rotates=False,
    generates=False,
    files=encoder_files("roberta", "lm_head."),
    architectures=BERT_CLASSES,
    published=("camembert-base",),
)
