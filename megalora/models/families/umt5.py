"""UMT5: T5 1.1 whose layers have a bias of the scores by distance each."""

from dataclasses import replace

from megalora.models.families import t5
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return t5.read(hf, shares_tables=False)


FAMILY = replace(
    t5.FAMILY, types=("umt5",), read=read, harmless=t5.FAMILY.harmless | {"scalable_attention"},
    published=("umt5-small",),
)
