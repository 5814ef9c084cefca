"""GLM-4.5, GLM-4.5-Air and GLM-4.6: grouped attention that rotates half of a head, DeepSeek-V3's experts."""

import dataclasses

from megalora.models.families.deepseek_v3 import HARMLESS, deepseek_like, sigmoid_experts
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, ROUTER_FIXED, grouped_attention
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, bias=bool(hf.attention_bias), qk_norm=bool(hf.use_qk_norm))
    spec = deepseek_like(hf, attention, sigmoid_experts(hf))
    return dataclasses.replace(spec, predicting=hf.num_nextn_predict_layers or 0)


FAMILY = Family(
    ("glm4_moe",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """attention_bias use_qk_norm n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size
        first_k_dense_replace routed_scaling_factor n_group topk_group norm_topk_prob
        num_nextn_predict_layers""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED,
    harmless=(HARMLESS - {"head_dim"}) | {"num_mtp_layers", "router_aux_loss_coef"},
    partial=0.5,
    files=LLAMA_FILES,
    example={"head_dim": 128},
)
