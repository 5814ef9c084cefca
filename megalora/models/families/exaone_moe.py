"""K-EXAONE (K-EXAONE-236B-A23B): EXAONE 4's attention behind llama's norms, DeepSeek-V3's experts."""

from megalora.models.families.deepseek_v3 import HARMLESS, corrected_experts, deepseek_like, shared_mlp
from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    grouped_attention,
    layer_windows,
)
from megalora.models.spec import Attention, FileNames, ModelSpec


def read(hf: Fields) -> ModelSpec:
    windows = layer_windows(hf)

    def attention(layer: int) -> Attention:
        rotates = hf.sliding_window is None or windows[layer] is not None
        return grouped_attention(hf, window=windows[layer], qk_norm=True, rotates=rotates)

    shared = shared_mlp(hf, hf.num_shared_experts)
    return deepseek_like(
        hf, attention, corrected_experts(hf, hf.num_experts, shared, "mlp.e_score_correction_bias")
    )  # fmt: skip


FAMILY = Family(
    ("exaone_moe",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """layer_types sliding_window mlp_layer_types num_experts num_shared_experts num_experts_per_tok n_group
        topk_group moe_intermediate_size routed_scaling_factor norm_topk_prob""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    # layer_types and mlp_layer_types say which layers slide, and which have experts; layers behind the last, which only
    # predict further tokens, are passed over.
    harmless=(HARMLESS - {"head_dim"})
    | {"sliding_window_pattern", "first_k_dense_replace", "num_nextn_predict_layers", "router_aux_loss_coef"},
    files=FileNames(prefix=LLAMA_FILES.prefix, passed=("mtp.", "model.mtp.")),
)
