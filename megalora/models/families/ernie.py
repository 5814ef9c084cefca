"""ERNIE 1.0 to 3.0: BERT's mathematics; where use_task_id says so, the first row of a table of tasks is added."""

from dataclasses import replace

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
from megalora.models.spec import ModelSpec, Positions


def read(hf: Fields) -> ModelSpec:
    spec = encoder(hf, "ernie", (token_head(hf), pooled_head(hf, "ernie")))
    if not hf.use_task_id:
        return spec
    tasks = Positions("ernie.embeddings.task_type_embeddings", hf.task_type_vocab_size)
    return replace(spec, embedding=replace(spec.embedding, tasks=tasks))


FAMILY = Family(
    ("ernie",),
    read,
    reads=BERT_FIELDS | {"use_task_id", "task_type_vocab_size"},
    fixed=BERT_FIXED,
    harmless=frozenset({"gradient_checkpointing", "tie_word_embeddings"}),
    rotates=False,
    generates=False,
    files=encoder_files("ernie", "cls."),
    architectures=BERT_CLASSES,
    published=("ernie-3.0-base-zh",),
)
