"""Falcon 40B under its first name: the config that names remote code, which is not run."""

from dataclasses import replace

from megalora.models.families import refined_web_model
from megalora.models.families.falcon import falcon
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return falcon(hf)


FAMILY = replace(
    refined_web_model.FAMILY,
    types=("RefinedWeb",),
    read=read,
    defaults={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2, "parallel_attn": True},
    published=("falcon-40b, first form",),
)
