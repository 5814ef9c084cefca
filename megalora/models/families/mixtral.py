"""Mixtral: Mistral's attention, and in each layer the best of several MLPs for each token, weighted."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    ROUTER_HARMLESS,
    gated_mlp,
    grouped_attention,
    llama_like,
    router,
)
from megalora.models.spec import Experts, ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention, count = grouped_attention(hf, window=hf.sliding_window), hf.num_local_experts
    expert = gated_mlp(hf, at="block_sparse_moe.experts.{expert}", names=("w1", "w3", "w2"))
    experts = Experts(router(hf, "block_sparse_moe.gate", count, renormalise=True), count, expert)
    return llama_like(hf, lambda layer: attention, experts)


FAMILY = Family(
    ("mixtral",),
    read,
    reads=LLAMA_FIELDS | {"sliding_window", "num_local_experts", "num_experts_per_tok"},
    fixed=LLAMA_FIXED | ROUTER_FIXED | {"router_jitter_noise": 0.0},
    harmless=ROUTER_HARMLESS,
    theta=1e6,
    files=LLAMA_FILES,
    published=("Mixtral-8x7B-v0.1",),
)
