"""Qwen3-Next-80B-A3B: linear attention by the gated delta rule in three of four layers, experts."""

from megalora.models.family import Family, Fields
from megalora.models.hybrids import (
    HYBRID_FIELDS,
    HYBRID_FILES,
    HYBRID_FIXED,
    HYBRID_HARMLESS,
    HYBRID_OPTIONAL,
    fused_delta,
    hybrid,
    hybrid_experts,
)
from megalora.models.parts import ROUTER_FIXED, ROUTER_HARMLESS, gated_mlp, sparse_layers
from megalora.models.spec import Mixer, ModelSpec


def read(hf: Fields) -> ModelSpec:
    sparse, dense = sparse_layers(hf), gated_mlp(hf)
    experts = hybrid_experts(hf, renormalise=bool(hf.norm_topk_prob))

    def mlp(layer: int) -> Mixer:
        return experts if sparse[layer] else dense

    return hybrid(hf, fused_delta(hf), mlp)


FAMILY = Family(
    ("qwen3_next",),
    read,
    reads=HYBRID_FIELDS
    | frozenset(
        """num_experts num_experts_per_tok norm_topk_prob moe_intermediate_size shared_expert_intermediate_size
        decoder_sparse_step mlp_only_layers""".split()
    ),
    fixed=HYBRID_FIXED | ROUTER_FIXED,
    harmless=HYBRID_HARMLESS | ROUTER_HARMLESS,
    optional=HYBRID_OPTIONAL,
    partial=0.25,
    files=HYBRID_FILES,
    published=("Qwen3-Next-80B-A3B-Instruct",),
)
