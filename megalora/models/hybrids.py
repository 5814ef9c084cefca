"""Decoders with linear attention by the gated delta rule in most layers (Qwen3-Next, Qwen3.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megalora.models.family import Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FIXED,
    fused,
    gated_mlp,
    head_dim,
    kv_heads,
    llama_ends,
    rms,
    router,
)
from megalora.models.recurrent import DeltaAttention
from megalora.models.spec import (
    MLP,
    Attention,
    Blocked,
    ByHead,
    Experts,
    FileNames,
    Fused,
    Interleaved,
    Layer,
    Linear,
    Mixer,
    ModelSpec,
    Norm,
    Residual,
)

HYBRID_FIELDS = LLAMA_FIELDS | frozenset(
    """attention_bias layer_types full_attention_interval linear_conv_kernel_dim linear_key_head_dim
    linear_value_head_dim linear_num_key_heads linear_num_value_heads""".split()
)
HYBRID_OPTIONAL = frozenset({"full_attention_interval"})
HYBRID_FIXED = LLAMA_FIXED | {"attn_output_gate": True}
# Decays are in float32 always, and layers that predict further tokens are passed over.
HYBRID_HARMLESS = frozenset({"mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})
HYBRID_FILES = FileNames(prefix="model.", ahead=("mtp.",))
_AT, _EXPERT = "linear_attn", "mlp.experts.{expert}"


def hybrid(hf: Fields, delta: DeltaAttention, mlp: Callable[[int], Mixer]) -> ModelSpec:
    """Return a decoder with llama's names whose layers have `delta`, or attention with a gate, by layer_types; mlp: of
    each layer."""
    attention, linear = _gated_attention(hf), _linear_layers(hf)

    def layer(index: int) -> Layer:
        mixer = delta if linear[index] else attention
        return (
            Residual(mixer, _norm(hf, "input_layernorm")),
            Residual(mlp(index), _norm(hf, "post_attention_layernorm")),
        )

    return llama_ends(hf, layer, _norm(hf, "model.norm"))


def fused_delta(hf: Fields) -> DeltaAttention:
    """Return linear attention whose inputs are two linears, both by key head (Qwen3-Next)."""
    key, values, repeats = hf.linear_key_head_dim, hf.linear_value_head_dim, _repeats(hf)
    qkvz = Interleaved((("q", key), ("k", key), ("v", repeats * values), ("z", repeats * values)))
    made = {name: _fused(hf, "in_proj_qkvz", qkvz) for name in "qkvz"}
    ba = Interleaved((("b", repeats), ("a", repeats)))
    return _delta(hf, made | {name: _fused(hf, "in_proj_ba", ba) for name in "ba"})


def plain_delta(hf: Fields) -> DeltaAttention:
    """Return linear attention with one linear for q, k and v, and one each for the others (Qwen3.5)."""
    key, value, groups = hf.linear_key_head_dim, hf.linear_value_head_dim, hf.linear_num_key_heads
    units = tuple((name, groups) for name in "qkv")
    qkv = Fused(
        Linear(f"{_AT}.in_proj_qkv", hf.hidden_size, groups * (2 * key + _repeats(hf) * value)),
        Blocked(units, (key, key, _repeats(hf) * value)),
    )
    heads = hf.linear_num_value_heads
    sizes = {"z": heads * value, "b": heads, "a": heads}
    others = {name: Linear(f"{_AT}.in_proj_{name}", hf.hidden_size, size) for name, size in sizes.items()}
    return _delta(hf, dict.fromkeys("qkv", qkv) | others)


def hybrid_experts(hf: Fields, *, renormalise: bool, expert: MLP | None = None, **more: Any) -> Experts:
    """Return experts beside an MLP of all tokens, gated by one number a token, with the names of qwen2_moe.

    expert  of which each has its own; more: further fields of Experts
    """
    count = hf.num_experts
    return Experts(
        router(hf, "mlp.gate", count, renormalise=renormalise),
        count,
        expert or gated_mlp(hf, at=_EXPERT, inner=hf.moe_intermediate_size),
        gated_mlp(hf, at="mlp.shared_expert", inner=hf.shared_expert_intermediate_size),
        Linear("mlp.shared_expert_gate", hf.hidden_size, 1),
        **more,
    )


def stacked_experts(hf: Fields) -> Experts:
    """Return the same where files hold gate and up of all experts of a layer in one tensor (Qwen3.5); some have each of
    every expert apart."""
    size, inner = hf.hidden_size, hf.moe_intermediate_size
    gate_up = fused(f"{_EXPERT}.gate_up_proj", size, (("gate", inner), ("up", inner)))
    expert = MLP(gate_up, Linear(f"{_EXPERT}.down_proj", inner, size), inner, "silu", gate_up)
    return hybrid_experts(hf, renormalise=True, expert=expert, stacked=True, apart=("gate_proj", "up_proj"))


def _norm(hf: Fields, name: str, size: int | None = None) -> Norm:
    return rms(hf, name, size, precise=True, offset=True)


def _linear_layers(hf: Fields) -> tuple[bool, ...]:
    """Return whether each layer has linear attention. Raises UserError for other kinds of layers."""
    kinds, every = hf.layer_types, hf.full_attention_interval
    if len(kinds or ()) != hf.num_hidden_layers:
        hf.fail(f"layer_types has {len(kinds or ())} entries for {hf.num_hidden_layers} layers", "correct it")
    for kind in kinds:
        if kind not in ("full_attention", "linear_attention"):
            hf.fail(
                f"layer_types has {kind!r}, which is not implemented",
                "take a model with full_attention and linear_attention",
            )
    linear = tuple(kind == "linear_attention" for kind in kinds)
    if all(linear):
        hf.fail("layer_types has linear_attention alone, which is not implemented", "take a model with both kinds")
    if every is not None and linear != tuple((i + 1) % every > 0 for i in range(len(linear))):
        hf.fail(f"layer_types is not what full_attention_interval ({every}) says", "keep one of them")
    return linear


def _gated_attention(hf: Fields) -> Attention:
    """Return attention with a gate for each head beside its q, and norms on q and k."""
    heads, kv, dim, size, bias = hf.num_attention_heads, kv_heads(hf), head_dim(hf), hf.hidden_size, hf.attention_bias
    q = Fused(Linear("self_attn.q_proj", size, 2 * heads * dim, bool(bias)), ByHead(dim, ("q", "gate")))
    k, v = (Linear(f"self_attn.{name}_proj", size, kv * dim, bool(bias)) for name in "kv")
    out = Linear("self_attn.o_proj", heads * dim, size, bool(bias))
    q_norm, k_norm = (_norm(hf, f"self_attn.{name}_norm", dim) for name in "qk")
    return Attention(q, k, v, out, heads, kv, dim, hf.rotary(dim), q_norm=q_norm, k_norm=k_norm, gate=q)


def _repeats(hf: Fields) -> int:
    values, keys = hf.linear_num_value_heads, hf.linear_num_key_heads
    if values % keys:
        hf.fail(f"linear_num_value_heads ({values}) is not a multiple of linear_num_key_heads ({keys})", "correct it")
    return values // keys


def _fused(hf: Fields, name: str, rows: Interleaved) -> Fused:
    out = hf.linear_num_key_heads * sum(count for _, count in rows.parts)
    return Fused(Linear(f"{_AT}.{name}", hf.hidden_size, out), rows)


def _delta(hf: Fields, made: dict[str, Fused] | dict[str, Fused | Linear]) -> DeltaAttention:
    heads, value = hf.linear_num_value_heads, hf.linear_value_head_dim
    return DeltaAttention(
        **made,
        out=Linear(f"{_AT}.out_proj", heads * value, hf.hidden_size),
        groups=hf.linear_num_key_heads,
        repeats=_repeats(hf),
        key=hf.linear_key_head_dim,
        value=value,
        width=hf.linear_conv_kernel_dim,
        convolution=f"{_AT}.conv1d",
        decay=f"{_AT}.A_log",
        bias=f"{_AT}.dt_bias",
        norm=rms(hf, f"{_AT}.norm", value),
    )
