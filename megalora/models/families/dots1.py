"""dots.llm1: Qwen3's attention, DeepSeek-V3's experts."""

from megalora.models.families.deepseek_v3 import HARMLESS, deepseek_like, sigmoid_experts
from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    grouped_attention,
    layer_windows,
)
from megalora.models.spec import Attention, ModelSpec


def read(hf: Fields) -> ModelSpec:
    windows, bias = layer_windows(hf), bool(hf.attention_bias)
    if hf.scoring_func not in (None, "noaux_tc", "sigmoid"):  # two names of one
        hf.fail(f"scoring_func = {hf.scoring_func!r} is not implemented", "take a model with scoring_func = 'noaux_tc'")

    def attention(layer: int) -> Attention:
        return grouped_attention(hf, bias=bias, out_bias=bias, window=windows[layer], qk_norm=True)

    return deepseek_like(hf, attention, sigmoid_experts(hf))


FAMILY = Family(
    ("dots1",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """attention_bias layer_types sliding_window n_routed_experts n_shared_experts num_experts_per_tok scoring_func
        moe_intermediate_size first_k_dense_replace routed_scaling_factor n_group topk_group norm_topk_prob""".split()
    ),
    optional=frozenset({"scoring_func"}),
    fixed=LLAMA_FIXED | ROUTER_FIXED | {"topk_method": "noaux_tc", "moe_layer_freq": 1},
    harmless=(HARMLESS - {"head_dim"}) | {"max_window_layers"},  # layer_types says which layers slide
    files=LLAMA_FILES,
    example={"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    published=("dots.llm1.inst",),
)
