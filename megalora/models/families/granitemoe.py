"""Granite 3 MoE (granite-3.1-1b-a400m, granite-3.1-3b-a800m): Granite's multipliers around experts in one tensor."""

import dataclasses

from megalora.models.families.granite import FAMILY as GRANITE
from megalora.models.families.granite import decoder_of
from megalora.models.family import Fields
from megalora.models.parts import ROUTER_FIXED, ROUTER_HARMLESS, fused, router
from megalora.models.spec import MLP, Experts, Linear, ModelSpec


def experts(hf: Fields, shared: MLP | None = None, old: bool = True) -> Experts:
    """Return Granite's experts. shared: the MLP of all tokens; old: files have the names of transformers 4."""
    size, inner, count = hf.hidden_size, hf.intermediate_size, hf.num_local_experts
    at = "block_sparse_moe.experts.{expert}."
    gate_up = fused(f"{at}gate_up_proj", size, (("gate", inner), ("up", inner)))
    expert = MLP(gate_up, Linear(f"{at}down_proj", inner, size), inner, "silu", gate_up)
    name = "block_sparse_moe.router.layer" if old else "block_sparse_moe.router"
    choice = router(hf, name, count, by_logits=True, renormalise=True)
    return Experts(choice, count, expert, shared, stacked=True, in_files=IN_FILES if old else ())


def read(hf: Fields) -> ModelSpec:
    return decoder_of(hf, experts(hf), 1 / hf.logits_scaling)


# The experts have the names of transformers 5, to which peft's adapters belong; the files have those of transformers 4.
IN_FILES = (
    ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
    ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
)
FAMILY = dataclasses.replace(
    GRANITE,
    types=("granitemoe",),
    read=read,
    reads=GRANITE.reads - {"mlp_bias"} | {"num_local_experts", "num_experts_per_tok"},
    fixed={**GRANITE.fixed, **ROUTER_FIXED},
    harmless=ROUTER_HARMLESS,
    published=("granite-3.1-1b-a400m-base", "granite-3.1-3b-a800m-base"),
)
