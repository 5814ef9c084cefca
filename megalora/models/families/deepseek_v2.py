"""DeepSeek-V2 and DeepSeek-V2-Lite: latent attention, experts chosen by softmax scores beside shared ones."""

from megalora.models.families.deepseek_v3 import (
    HARMLESS,
    LATENT_FIELDS,
    deepseek_like,
    grouped_choice,
    latent_attention,
    shared_mlp,
)
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, LLAMA_FIXED, ROUTER_FIXED, gated_mlp, router
from megalora.models.spec import Experts, ModelSpec


def read(hf: Fields) -> ModelSpec:
    count = hf.n_routed_experts
    limited = hf.topk_method == "group_limited_greedy"
    if hf.topk_method not in ("greedy", "group_limited_greedy"):
        hf.fail(
            f"topk_method = {hf.topk_method!r} is not implemented", "take a model with greedy or group_limited_greedy"
        )
    how = grouped_choice(hf, count) if limited else {}
    choice = router(hf, "mlp.gate", count, scale=hf.routed_scaling_factor, wide=True, group_top=1, **how)
    expert = gated_mlp(hf, at="mlp.experts.{expert}", inner=hf.moe_intermediate_size)
    return deepseek_like(hf, latent_attention(hf), Experts(choice, count, expert, shared_mlp(hf)))


FAMILY = Family(
    ("deepseek_v2",),
    read,
    reads=LATENT_FIELDS | {"topk_method"},
    # transformers never renormalises the weights of this family, whatever norm_topk_prob says.
    fixed=LLAMA_FIXED
    | ROUTER_FIXED
    | {"mlp_bias": False, "norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1},
    harmless=HARMLESS,
    files=LLAMA_FILES,
    example={"num_experts_per_tok": 6, "n_routed_experts": 64},
)
