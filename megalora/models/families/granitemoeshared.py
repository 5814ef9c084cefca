"""Granite MoE with a shared MLP: Granite 3 MoE whose tokens all go through one MLP beside the experts."""

import dataclasses

from megalora.models.families.granite import decoder_of
from megalora.models.families.granitemoe import FAMILY as GRANITEMOE
from megalora.models.families.granitemoe import experts
from megalora.models.family import Fields
from megalora.models.parts import fused
from megalora.models.spec import MLP, Linear, ModelSpec


def shared_mlp(hf: Fields) -> MLP | None:
    """Return the MLP of all tokens; None where shared_intermediate_size is 0."""
    size, inner = hf.hidden_size, hf.shared_intermediate_size
    gate_up = fused("shared_mlp.input_linear", size, (("gate", inner), ("up", inner)))
    return MLP(gate_up, Linear("shared_mlp.output_linear", inner, size), inner, "silu", gate_up) if inner else None


def read(hf: Fields) -> ModelSpec:
    return decoder_of(hf, experts(hf, shared_mlp(hf)), 1 / hf.logits_scaling)


FAMILY = dataclasses.replace(
    GRANITEMOE,
    types=("granitemoeshared",),
    read=read,
    reads=GRANITEMOE.reads | {"shared_intermediate_size"},
    published=(),
)
