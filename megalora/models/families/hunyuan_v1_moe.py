"""Hunyuan MoE (Hunyuan-A13B): Hunyuan's attention, experts beside an MLP of all tokens."""

import dataclasses
from collections.abc import Sequence

from megalora.models.families.hunyuan_v1_dense import FAMILY as DENSE
from megalora.models.families.hunyuan_v1_dense import attention_of
from megalora.models.family import Fields
from megalora.models.parts import ROUTER_FIXED, gated_mlp, llama_like, router
from megalora.models.spec import Experts, ModelSpec


def of_every_layer(hf: Fields, name: str) -> int | None:
    """Return the number of a field that may have one for each layer. Raises UserError where these differ."""
    value = getattr(hf, name)
    if not isinstance(value, Sequence):
        return value
    if len({*value}) != 1:
        hf.fail(f"{name} differs between layers, which is not implemented", "take a model whose layers are alike")
    return value[0]


def read(hf: Fields) -> ModelSpec:
    inner, shared = of_every_layer(hf, "experts_intermediate_size"), of_every_layer(hf, "num_shared_expert")
    if inner not in (None, hf.intermediate_size) or shared not in (None, 1):
        hf.fail(
            f"moe_intermediate_size = {inner} and num_shared_expert = {shared} are not implemented: transformers has "
            f"experts and one MLP of all tokens of intermediate_size ({hf.intermediate_size})",
            "take config.json from the model's own folder",
        )
    count, attention = hf.num_experts, attention_of(hf)
    choice = router(
        hf, "mlp.gate.wg", count, top=of_every_layer(hf, "moe_topk"), renormalise=True, wide=True
    )  # fmt: skip
    experts = Experts(choice, count, gated_mlp(hf, at="mlp.experts.{expert}"), gated_mlp(hf, at="mlp.shared_mlp"))
    return llama_like(hf, lambda layer: attention, experts)


FAMILY = dataclasses.replace(
    DENSE,
    types=("hunyuan_v1_moe",),
    read=read,
    reads=DENSE.reads | {"num_experts", "moe_topk", "num_shared_expert", "experts_intermediate_size"},
    fixed={**DENSE.fixed, **ROUTER_FIXED, "use_mixed_mlp_moe": True, "norm_topk_prob": True},
    harmless=DENSE.harmless | {"moe_drop_tokens", "moe_random_routing_dropped_token"},  # no token is dropped
    aliases={"moe_intermediate_size": "experts_intermediate_size"},
    optional=frozenset({"num_shared_expert", "experts_intermediate_size"}),
    published=("Hunyuan-A13B-Instruct",),
)
