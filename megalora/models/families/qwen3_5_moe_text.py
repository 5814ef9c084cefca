"""Qwen3.5 of experts, the language model: Qwen3.5 with experts in every layer, and one that all tokens go through."""

import dataclasses

from megalora.models.families.qwen3_5_text import FAMILY as DENSE
from megalora.models.family import Fields
from megalora.models.hybrids import hybrid, plain_delta, stacked_experts
from megalora.models.parts import ROUTER_FIXED, ROUTER_HARMLESS
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    experts = stacked_experts(hf)
    return hybrid(hf, plain_delta(hf), lambda layer: experts)


FAMILY = dataclasses.replace(
    DENSE,
    types=("qwen3_5_moe_text",),
    read=read,
    reads=(DENSE.reads - {"intermediate_size"})
    | {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"},
    fixed={**DENSE.fixed, **ROUTER_FIXED},
    harmless=DENSE.harmless | ROUTER_HARMLESS | {"mlp_only_layers"},
)
