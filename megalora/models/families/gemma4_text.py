"""Gemma 4 (text, 31B, 26B-A4B): norms on q, k and v, wider heads where attention is full, layers scaled by a number."""

from collections.abc import Callable

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    fused,
    gated_mlp,
    llama_ends,
    rms,
    router,
    scaled_ends,
    sliding_layers,
)
from megalora.models.spec import (
    MLP,
    Attention,
    Experts,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    ParallelResidual,
    Residual,
)

FULL_HEAD_DIM = 512  # where config.json leaves global_head_dim out
_OWN = ("head_dim", "num_key_value_heads")
MOE = frozenset({"num_experts", "top_k_experts", "moe_intermediate_size"})


def sizes_of(hf: Fields, slides: tuple[bool, ...]) -> list[tuple[int, int]]:
    """Return (head_dim, key/value heads) of each layer, by per_layer_config or by the fields of full attention.

    Raises UserError for a per_layer_config that says anything else.
    """
    plain = hf.head_dim, hf.num_key_value_heads
    if hf.own_of_layers is None:
        kv = hf.full_kv_heads if hf.attention_k_eq_v else None
        full = hf.full_head_dim or FULL_HEAD_DIM, kv or hf.num_key_value_heads
        return [plain if each else full for each in slides]
    found = [plain] * len(slides)
    for layer, own in hf.own_of_layers.items():
        known = str(layer).isdigit() and int(layer) < len(slides) and isinstance(own, dict) and own.keys() <= {*_OWN}
        if not known or not all(isinstance(size, int) and 0 < size <= 1 << 14 for size in own.values()):
            hf.fail(f"per_layer_config says {own!r:.100} of layer {layer!r:.20}, which is not read", "correct it")
        found[int(layer)] = tuple(own.get(name, size) for name, size in zip(_OWN, plain, strict=True))
    return found


def attention_of(hf: Fields) -> Callable[[int], Attention]:
    """Return the attention of each layer. Raises UserError for sizes that do not go together."""
    slides, size, heads = sliding_layers(hf, hf.layer_types), hf.hidden_size, hf.num_attention_heads
    sizes, bias = sizes_of(hf, slides), bool(hf.attention_bias)

    def attention(index: int) -> Attention:
        dim, kv = sizes[index]
        if heads % kv or dim % 2:
            hf.fail(f"layer {index} has {kv} key/value heads of {dim} features for {heads} heads", "correct it")
        q, k, v = (
            Linear(f"self_attn.{name}_proj", size, count * dim, bias)
            for name, count in (("q", heads), ("k", kv), ("v", kv))
        )
        v = k if hf.attention_k_eq_v and not slides[index] else v
        q_norm, k_norm = (rms(hf, f"self_attn.{name}_norm", dim, precise=True) for name in "qk")
        return Attention(
            q, k, v, Linear("self_attn.o_proj", heads * dim, size, bias), heads, kv, dim,
            hf.rotary(dim, sliding=slides[index]), hf.sliding_window if slides[index] else None, q_norm, k_norm,
            scale=1.0, v_norm=Norm("self_attn.v_norm", dim, hf.rms_norm_eps, weighted=False),
        )  # fmt: skip

    return attention


def experts_of(hf: Fields) -> Experts:
    """Return the experts beside the MLP. Both they and their router read the stream behind one norm without weights,
    each times a vector of its own. Raises UserError."""
    for name in sorted(MOE):
        if getattr(hf, name) is None:
            hf.fail(f"{name} is missing, and enable_moe_block is true", "take config.json from the model's own folder")
    count, size, inner = hf.num_experts, hf.hidden_size, hf.moe_intermediate_size
    choice = router(
        hf, "router.proj", count, top=hf.top_k_experts, renormalise=True, reads_scaled="router.scale",
        input_factor=size**-0.5, of_expert="router.per_expert_scale",
    )  # fmt: skip
    gate_up = fused("experts.{expert}.gate_up_proj", size, (("gate", inner), ("up", inner)))
    act = hf.activation_of("hidden_activation")
    expert = MLP(gate_up, Linear("experts.{expert}.down_proj", inner, size), inner, act, gate_up)
    if expert.fused_act is None:
        hf.fail(f"hidden_activation = {act!r} is not implemented for experts", "take a model with gelu_pytorch_tanh")
    return Experts(choice, count, expert, stacked=True, reads_scaled="pre_feedforward_layernorm_2.weight")


def read(hf: Fields) -> ModelSpec:
    if hf.use_bidirectional_attention not in (None, "vision"):  # of images, which are not read
        hf.fail("use_bidirectional_attention is not implemented", "take a model that writes text")
    attention, mlp = attention_of(hf), gated_mlp(hf, act=hf.activation_of("hidden_activation"))

    def norm(name: str) -> Norm:
        return rms(hf, f"{name}_layernorm", precise=True)

    beside = experts_of(hf) if hf.enable_moe_block else None

    def layer(index: int) -> Layer:
        first = Residual(attention(index), norm("input"), norm("post_attention"))
        if beside is None:
            return first, Residual(mlp, norm("pre_feedforward"), norm("post_feedforward"), total="layer_scalar")
        plain = Norm("pre_feedforward_rms", hf.hidden_size, hf.rms_norm_eps, weighted=False)
        branches = (
            Residual(mlp, norm("pre_feedforward"), rms(hf, "post_feedforward_layernorm_1", precise=True)),
            Residual(beside, plain, rms(hf, "post_feedforward_layernorm_2", precise=True)),
        )
        return first, ParallelResidual(branches, output_norm=norm("post_feedforward"), total="layer_scalar")

    spec = llama_ends(hf, layer, rms(hf, "model.norm", precise=True))
    return scaled_ends(spec, embedding=hf.hidden_size**0.5, rounded=True, softcap=hf.final_logit_softcapping)


FAMILY = Family(
    ("gemma4_text",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """attention_bias hidden_activation layer_types sliding_window final_logit_softcapping attention_k_eq_v
        full_head_dim full_kv_heads own_of_layers use_bidirectional_attention enable_moe_block num_experts top_k_experts
        moe_intermediate_size""".split()
    ),
    # Vectors of each layer's own, and keys of another layer: E2B and E4B.
    fixed={
        "attention_dropout": 0.0, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
    },
    harmless=frozenset(
        "per_layer_config allow_global_per_layer_attribute_access vocab_size_per_layer_input".split()
    ),
    # Its class in transformers takes these apart: under other names they stay as the file has them.
    aliases={
        "global_head_dim": "full_head_dim", "num_global_key_value_heads": "full_kv_heads",
        "per_layer_config": "own_of_layers",
    },
    optional=frozenset({"full_head_dim", "full_kv_heads", "own_of_layers", "use_bidirectional_attention"}) | MOE,
    partial=1.0,
    rope_default={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    files=LLAMA_FILES,
    example={"hidden_size_per_layer_input": 0},
)  # fmt: skip
