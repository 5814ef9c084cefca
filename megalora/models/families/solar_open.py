"""Solar-Open: llama's attention, DeepSeek-V3's experts in each layer."""

from megalora.models.families.deepseek_v3 import HARMLESS, sigmoid_experts
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FIELDS, LLAMA_FILES, LLAMA_FIXED, ROUTER_FIXED, grouped_attention, llama_like
from megalora.models.spec import ModelSpec


def read(hf: Fields) -> ModelSpec:
    attention = grouped_attention(hf, bias=bool(hf.attention_bias))
    return llama_like(hf, lambda layer: attention, sigmoid_experts(hf))


FAMILY = Family(
    ("solar_open",),
    read,
    reads=LLAMA_FIELDS - {"intermediate_size"}
    | frozenset(
        """attention_bias n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size
        routed_scaling_factor n_group topk_group norm_topk_prob""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED | {"first_k_dense_replace": 0, "use_qk_norm": False},
    harmless=(HARMLESS - {"head_dim"}) | {"intermediate_size"},  # of dense layers, of which there are none
    theta=1e6,
    partial=1.0,
    files=LLAMA_FILES,
    published=("Solar-Open-100B",),
)
