"""Sarvam-105B: DeepSeek-V3 with sizes and names of fields of its own."""

import dataclasses

from megalora.models.families import deepseek_v3
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    return deepseek_v3.read(hf)


FAMILY = dataclasses.replace(
    deepseek_v3.FAMILY,
    types=("sarvam_mla",),
    read=read,
    aliases={"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"},
    harmless=deepseek_v3.FAMILY.harmless | {"q_head_dim"},
)
