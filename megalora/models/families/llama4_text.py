"""Llama 4's text model (Scout, Maverick): attention in chunks, layers without positions, experts and dense layers."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    ROUTER_HARMLESS,
    fused,
    gated_mlp,
    grouped_attention,
    llama_like,
    router,
)
from megalora.models.spec import MLP, Attention, Experts, Linear, ModelSpec, Norm, Temperature

_KINDS = ("full_attention", "chunked_attention")


def chunks(hf: Fields) -> tuple[int | None, ...]:
    """Return each layer's chunk: attention_chunk_size where its `layer_types` says chunked_attention."""
    kinds, size = hf.layer_types, hf.attention_chunk_size
    if len(kinds) != hf.num_hidden_layers:
        hf.fail(f"layer_types has {len(kinds)} entries for {hf.num_hidden_layers} layers", "correct it")
    for kind in kinds:
        if kind not in _KINDS:
            hf.fail(f"layer_types has {kind!r}, which is not implemented", f"take a model with {' and '.join(_KINDS)}")
    if size is None and _KINDS[1] in kinds:
        hf.fail("attention_chunk_size is missing", "take config.json from the model's own folder")
    return tuple(size if kind == _KINDS[1] else None for kind in kinds)


def experts(hf: Fields) -> Experts:
    """Return experts that read their input times their score, and one that all tokens go through."""
    size, inner, count = hf.hidden_size, hf.intermediate_size, hf.num_local_experts
    at = "feed_forward.experts.{expert}."
    gate_up = fused(f"{at}gate_up_proj", size, (("gate", inner), ("up", inner)), transposed=True)
    down = Linear(f"{at}down_proj", inner, size, transposed=True)
    expert = MLP(gate_up, down, inner, "silu", gate_up)
    choice = router(hf, "feed_forward.router", count, score="sigmoid", by_logits=True)
    shared = gated_mlp(hf, at="feed_forward.shared_expert")
    return Experts(choice, count, expert, shared, stacked=True, weighs_input=True)


def read(hf: Fields) -> ModelSpec:
    rotates, chunk, bias = hf.no_rope_layers, chunks(hf), bool(hf.attention_bias)
    if len(rotates) < hf.num_hidden_layers:
        hf.fail(f"no_rope_layers has {len(rotates)} entries for {hf.num_hidden_layers} layers", "correct it")
    temperature = Temperature(hf.floor_scale, hf.attn_scale) if hf.attn_temperature_tuning else None
    routed, dense = experts(hf), gated_mlp(hf, at="feed_forward", inner=hf.intermediate_size_mlp)

    def attention(layer: int) -> Attention:
        turns = bool(rotates[layer])
        normed = turns and hf.use_qk_norm
        q_norm, k_norm = (
            Norm(f"self_attn.{name}_norm", hf.head_dim, hf.rms_norm_eps, weighted=False) if normed else None
            for name in "qk"
        )
        return grouped_attention(
            hf, bias=bias, out_bias=bias, rotates=turns, interleaved=True, chunk=chunk[layer], turns_first=True,
            q_norm=q_norm, k_norm=k_norm, temperature=None if turns else temperature,
        )  # fmt: skip

    return llama_like(hf, attention, lambda layer: routed if layer in hf.moe_layers else dense)


FAMILY = Family(
    ("llama4_text",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """intermediate_size_mlp num_local_experts num_experts_per_tok moe_layers use_qk_norm no_rope_layers layer_types
        attention_chunk_size attn_temperature_tuning floor_scale attn_scale attention_bias""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED | {"router_jitter_noise": 0.0},
    # moe_layers and no_rope_layers say what these do; the last is of a tool that quantises.
    harmless=ROUTER_HARMLESS | {"interleave_moe_layer_step", "no_rope_layer_interval", "for_llm_compressor"},
    theta=500000.0,
    files=LLAMA_FILES,
)
