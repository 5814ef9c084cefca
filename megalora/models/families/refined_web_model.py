"""Falcon 7B and Falcon-RW under their first name: the configs that name remote code, which is not run."""

from dataclasses import replace

from megalora.models.families import falcon
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec

NAMES = {
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
}


def read(hf: Fields) -> ModelSpec:
    return falcon.falcon(hf)


FAMILY = replace(
    falcon.FAMILY,
    types=("RefinedWebModel",),
    read=read,
    config_class="falcon",
    aliases=NAMES,
    defaults={"multi_query": False, "parallel_attn": False},  # as the first config class had them
    published=("falcon-7b, first form",),
)
