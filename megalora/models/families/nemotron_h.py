"""Nemotron-H, Nemotron Nano 2, Nemotron 3 Nano: Mamba-2, attention, a plain MLP or plain experts in each layer."""

from megalora.models.families.deepseek_v3 import grouped_choice
from megalora.models.family import Family, Fields
from megalora.models.parts import ROUTER_FIXED, decoder, kv_heads, plain_mlp, router
from megalora.models.spec import (
    MLP,
    Attention,
    Experts,
    FileNames,
    Layer,
    Linear,
    Mixer,
    ModelSpec,
    Norm,
    Residual,
    Stack,
)
from megalora.models.state_spaces import layer_kinds, state_space


def read(hf: Fields) -> ModelSpec:
    kinds = layer_kinds(hf, hf.layers_block_type, ("mlp", "moe"))
    if hf.tie_word_embeddings:
        hf.fail("tie_word_embeddings = True is not implemented, as in transformers", "take a model with a head")
    bias, inner = bool(hf.use_bias), hf.mamba_num_heads * hf.mamba_head_dim
    mixers: dict[str, Mixer] = {
        "linear_attention": state_space(
            hf, "mixer", hf.mamba_num_heads, hf.mamba_head_dim, hf.n_groups, hf.ssm_state_size, hf.conv_kernel,
            (bias, bias), bool(hf.use_conv_bias), _norm(hf, "mixer.norm", inner), out_by_name=True,
        ),
        "full_attention": _attention(hf),
        "mlp": _mlp(hf, "mixer", hf.intermediate_size),
    }  # fmt: skip
    if "moe" in kinds:
        mixers["moe"] = _experts(hf)

    def layer(index: int) -> Layer:
        return (Residual(mixers[kinds[index]], _norm(hf, "norm", hf.hidden_size)),)

    stack = Stack("model.layers", tuple(map(layer, range(len(kinds)))), _norm(hf, "model.norm_f", hf.hidden_size))
    return decoder(hf, stack, embedding="model.embeddings", head="lm_head")


def _norm(hf: Fields, name: str, size: int) -> Norm:
    return Norm(name, size, hf.layer_norm_epsilon, precise=True)


def _mlp(hf: Fields, at: str, inner: int, bias: bool | None = None) -> MLP:
    bias = bool(hf.mlp_bias) if bias is None else bias
    return plain_mlp(hf, f"{at}.up_proj", f"{at}.down_proj", inner, "mlp_hidden_act", bias=bias)


def _experts(hf: Fields) -> Experts:
    """Return DeepSeek-V3's experts without gates, beside an MLP of all tokens."""
    count, groups = hf.n_routed_experts, grouped_choice(hf, hf.n_routed_experts)
    choice = router(
        hf, "mixer.gate", count, score="sigmoid", renormalise=bool(hf.norm_topk_prob), scale=hf.routed_scaling_factor,
        wide=True, correction="mixer.gate.e_score_correction_bias", group_top=min(2, count // groups["groups"]),
        **groups,
    )  # fmt: skip
    at = "mixer.experts"
    expert = _mlp(hf, f"{at}.{{expert}}", hf.moe_intermediate_size, bias=False)
    shared = _mlp(hf, "mixer.shared_experts", hf.moe_shared_expert_intermediate_size)
    return Experts(choice, count, expert, shared, within=at)


def _attention(hf: Fields) -> Attention:
    """Return attention without positions."""
    heads, kv, dim, size = hf.num_attention_heads, kv_heads(hf), hf.head_dim, hf.hidden_size
    q, k, v = (Linear(f"mixer.{name}_proj", size, n * dim) for name, n in (("q", heads), ("k", kv), ("v", kv)))
    return Attention(q, k, v, Linear("mixer.o_proj", heads * dim, size), heads, kv, dim, None)


FAMILY = Family(
    ("nemotron_h",),
    read,
    reads=frozenset(
        """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size
        max_position_embeddings tie_word_embeddings layers_block_type layer_norm_epsilon mlp_hidden_act mlp_bias
        use_bias use_conv_bias mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel time_step_limit
        n_routed_experts num_experts_per_tok moe_intermediate_size moe_shared_expert_intermediate_size n_group
        topk_group routed_scaling_factor norm_topk_prob""".split()
    ),
    fixed={
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "attention_bias": False, "mamba_hidden_act": "silu",
        "mamba_proj_bias": False, "residual_in_fp32": False, "n_shared_experts": 1, **ROUTER_FIXED,
    },
    # layers_block_type says which layers there are (transformers makes it of hybrid_override_pattern); the rest is how
    # weights were drawn, how Mamba-2 and experts are computed, and layers that predict further tokens.
    # transformers cuts time steps at time_step_min from below, in training alone: NVIDIA's own code does not.
    harmless=frozenset(
        """hybrid_override_pattern mtp_hybrid_override_pattern mtp_layers_block_type num_nextn_predict_layers
        moe_shared_expert_overlap num_logits_to_keep use_mamba_kernels chunk_size expand time_step_min time_step_max
        time_step_floor time_step_rank rescale_prenorm_residual mamba_ssm_cache_dtype""".split()
    ),
    rotates=False,
    partial=1.0,
    files=FileNames(prefix="model.", renames=(("backbone.", "model."),), ahead=("mtp.",)),
    aliases={"attention_head_dim": "head_dim", "norm_eps": "layer_norm_epsilon"},
    optional=frozenset({"num_hidden_layers"}),
    example={"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"] * 4},
    published=("NVIDIA-Nemotron-Nano-9B-v2", "Nemotron-H-8B-Base-8K", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
)
