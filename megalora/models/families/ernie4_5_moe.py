"""ERNIE 4.5 MoE (ERNIE-4.5-21B-A3B): experts chosen by corrected softmax scores, beside an MLP of all tokens."""

import dataclasses

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
from megalora.models.spec import Experts, Mixer, ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention, dense, count = grouped_attention(hf, interleaved=True), gated_mlp(hf), hf.moe_num_experts
    choice = router(
        hf, "mlp.gate", count, renormalise=True, wide=True, correction="mlp.moe_statics.e_score_correction_bias",
        correction_row=True,
    )  # fmt: skip
    inner, shared = hf.moe_intermediate_size, hf.moe_num_shared_experts
    experts = Experts(
        choice,
        count,
        gated_mlp(hf, at="mlp.experts.{expert}", inner=inner),
        gated_mlp(hf, at="mlp.shared_experts", inner=inner * shared) if shared else None,
    )
    first, last, interval = hf.moe_layer_start_index, hf.moe_layer_end_index, hf.moe_layer_interval

    def mlp(layer: int) -> Mixer:
        return experts if first <= layer <= last and (layer + 1) % interval == 0 else dense

    return llama_like(hf, lambda layer: attention, mlp)


FAMILY = Family(
    ("ernie4_5_moe",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """moe_num_experts num_experts_per_tok moe_num_shared_experts moe_intermediate_size moe_layer_start_index
        moe_layer_end_index moe_layer_interval""".split()
    ),
    # moe_norm_min: the least that weights are divided by, which no sum of the best scores comes near.
    fixed=LLAMA_FIXED
    | ROUTER_FIXED
    | {"use_bias": False, "moe_norm_min": 1e-12, "use_rmsnorm": True, "moe_use_aux_free": True, "moe_gate": "topk"},
    # No token is dropped, whatever the capacity; layers that predict further tokens are passed over.
    harmless=ROUTER_HARMLESS | {"moe_capacity", "num_nextn_predict_layers"},
    theta=5e5,
    files=dataclasses.replace(LLAMA_FILES, passed=("model.mtp_",)),
    published=("ERNIE-4.5-21B-A3B-PT",),
)
