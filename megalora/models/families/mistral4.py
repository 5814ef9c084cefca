"""Mistral 4 (text): DeepSeek's latent attention and experts in one tensor; queries grow with their position."""

from megalora.models import rotary
from megalora.models.families.deepseek_v3 import (
    LATENT_FIELDS,
    deepseek_like,
    grouped_choice,
    latent_attention,
    shared_mlp,
)
from megalora.models.families.ministral3 import temperature_of
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, LLAMA_FIXED, ROUTER_FIXED, fused, router
from megalora.models.spec import MLP, Experts, Linear, ModelSpec, Rotary

_SHARE = "partial_rotary_factor"


def turned(hf: Fields) -> Rotary:
    """Return the rotation of the turned features of a head. Raises UserError where the rope fields name other ones."""
    size, share = hf.qk_rope_head_dim, hf.rope[_SHARE]
    if share not in (1.0, size / (hf.qk_nope_head_dim + size)):
        hf.fail(f"{_SHARE} = {share} is not the share of a head that qk_rope_head_dim ({size}) is", "correct it")
    return rotary.rotary({**hf.rope, _SHARE: 1.0}, size, hf.max_position_embeddings, hf.where)


def experts(hf: Fields) -> Experts:
    """Return experts by softmax, in the best groups, whose weights lie in one tensor of all."""
    size, inner, count, at = hf.hidden_size, hf.moe_intermediate_size, hf.n_routed_experts, "mlp.experts.{expert}."
    groups = grouped_choice(hf, count)
    choice = router(
        hf, "mlp.gate", count, renormalise=bool(hf.norm_topk_prob), scale=hf.routed_scaling_factor,
        group_top=min(2, count // groups["groups"]), **groups,
    )  # fmt: skip
    gate_up = fused(f"{at}gate_up_proj", size, (("gate", inner), ("up", inner)))
    expert = MLP(gate_up, Linear(f"{at}down_proj", inner, size), inner, "silu", gate_up)
    return Experts(choice, count, expert, shared_mlp(hf), stacked=True)


def read(hf: Fields) -> ModelSpec:
    attention = latent_attention(hf, hf.rope_interleave is not False, turned(hf), temperature_of(hf))
    return deepseek_like(hf, attention, experts(hf))


FAMILY = Family(
    ("mistral4",),
    read,
    reads=LATENT_FIELDS | {"norm_topk_prob", "rope_interleave"},
    fixed=LLAMA_FIXED | ROUTER_FIXED,
    harmless=frozenset({"head_dim", "qk_head_dim"}),
    rope_reads=frozenset({"original_max_position_embeddings", "llama_4_scaling_beta"}),
    rope_harmless=frozenset({"max_position_embeddings"}),
    partial=1.0,
    scaled=True,
    files=LLAMA_FILES,
)
