"""Granite 4.0 and 4.0 H: Granite's multipliers around Mamba-2 and attention, an MLP and, in some, experts beside it."""

import dataclasses

from megalora.models.families.granite import attention_of, decoder_of
from megalora.models.families.granitemoe import FAMILY as GRANITEMOE
from megalora.models.families.granitemoe import experts
from megalora.models.families.granitemoeshared import shared_mlp
from megalora.models.family import Fields
from megalora.models.spec import Mixer, ModelSpec
from megalora.models.state_spaces import MAMBA_FIELDS, MAMBA_HARMLESS, layer_kinds, mamba


def read(hf: Fields) -> ModelSpec:
    shared, position = shared_mlp(hf), hf.position_embedding_type
    if position not in (None, "nope", "rope"):
        hf.fail(f"position_embedding_type = {position!r} is not implemented", "take a model with rope, nope or null")
    kinds = layer_kinds(hf, hf.layer_types)
    attention = attention_of(hf, rotates=position == "rope")
    mixers: dict[str, Mixer] = {"full_attention": attention}
    if "linear_attention" in kinds:
        mixers["linear_attention"] = mamba(hf)
    mlp = experts(hf, shared) if hf.num_local_experts else shared
    if mlp is None:
        hf.fail("num_local_experts and shared_intermediate_size are 0: layers have no MLP", "correct them")
    return decoder_of(hf, mlp, 1 / hf.logits_scaling, attention=lambda layer: mixers[kinds[layer]])


FAMILY = dataclasses.replace(
    GRANITEMOE,
    types=("granitemoehybrid",),
    read=read,
    reads=GRANITEMOE.reads | MAMBA_FIELDS | {"shared_intermediate_size", "layer_types", "position_embedding_type"},
    fixed={**GRANITEMOE.fixed, "normalization_function": "rmsnorm"},
    harmless=GRANITEMOE.harmless | MAMBA_HARMLESS | {"init_method"},  # how weights were drawn before they were trained
    optional=frozenset({"position_embedding_type"}),
    example={"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
    published=("granite-4.0-h-micro", "granite-4.0-micro", "granite-4.0-h-tiny", "granite-4.0-h-small"),
)
