"""Granite MoE with sliding windows: attention with sinks, experts, and an MLP of all tokens if the config has one."""

import dataclasses

from megalora.models.families.granite import decoder_of
from megalora.models.families.granite_swa import FIELDS, sliding_attention
from megalora.models.families.granitemoe import experts
from megalora.models.families.granitemoeshared import FAMILY as SHARED
from megalora.models.families.granitemoeshared import shared_mlp
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    routed = experts(hf, shared_mlp(hf), old=False)
    return decoder_of(hf, routed, 1 / hf.logits_scaling, attention=sliding_attention(hf))


FAMILY = dataclasses.replace(SHARED, types=("granitemoe_swa",), read=read, reads=SHARED.reads | FIELDS)
