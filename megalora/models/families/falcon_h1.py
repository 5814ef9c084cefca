"""Falcon-H1 (Falcon-H1-0.5B to 34B): attention and Mamba-2 beside each other in every layer, each with multipliers."""

import dataclasses

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    gated_mlp,
    grouped_attention,
    llama_ends,
    rms,
    scaled_ends,
)
from megalora.models.spec import Attention, Layer, ModelSpec, ParallelResidual, Residual, StateSpace
from megalora.models.state_spaces import MAMBA_FIELDS, MAMBA_HARMLESS, state_space


def read(hf: Fields) -> ModelSpec:
    attention, mamba, norm = _attention(hf), _mamba(hf), rms(hf, "input_layernorm")
    gate, down = _numbers(hf, "mlp_multipliers", 2)
    mlp = dataclasses.replace(gated_mlp(hf, bool(hf.mlp_bias), at="feed_forward"), gate_scale=gate)
    # What attention reads is multiplied by attention_in_multiplier: its scores twice, its result once.
    both = (
        Residual(mamba, norm, scale=hf.ssm_out_multiplier),
        Residual(attention, norm, scale=hf.attention_in_multiplier * hf.attention_out_multiplier),
    )

    def layer(index: int) -> Layer:
        return (ParallelResidual(both), Residual(mlp, rms(hf, "pre_ff_layernorm"), scale=down))

    spec = llama_ends(hf, layer, rms(hf, "model.final_layernorm"))
    return scaled_ends(spec, embedding=hf.embedding_multiplier, logits=hf.lm_head_multiplier)


def _attention(hf: Fields) -> Attention:
    bias, factor = bool(hf.attention_bias), hf.attention_in_multiplier
    if bias and factor != 1.0:
        hf.fail("attention_bias with an attention_in_multiplier is not implemented", "take a model with one of them")
    found = grouped_attention(hf, bias=bias, out_bias=bias)
    return dataclasses.replace(found, scale=factor**2 * hf.key_multiplier * found.head_dim**-0.5)


def _mamba(hf: Fields) -> StateSpace:
    heads, features, bias = hf.mamba_n_heads, hf.mamba_d_head, bool(hf.mamba_proj_bias)
    inner = int(hf.mamba_expand * hf.hidden_size) if hf.mamba_d_ssm is None else hf.mamba_d_ssm
    if heads * features != inner:
        said = f"mamba_n_heads ({heads}) x mamba_d_head ({features}) is not the {inner} features of its Mamba-2"
        hf.fail(said, "correct mamba_d_ssm, or mamba_expand where that is null")
    if hf.mamba_rms_norm and hf.mamba_norm_before_gate:
        hf.fail("mamba_norm_before_gate = True is not implemented", "take a model with the norm behind the gate")
    if bias and hf.ssm_in_multiplier != 1.0:
        hf.fail("mamba_proj_bias with an ssm_in_multiplier is not implemented", "take a model with one of them")
    scales = [hf.ssm_in_multiplier * factor for factor in _numbers(hf, "ssm_multipliers", 5)]
    norm = rms(hf, "mamba.norm", inner, precise=True) if hf.mamba_rms_norm else None
    return state_space(
        hf, "mamba", heads, features, hf.mamba_n_groups, hf.mamba_d_state, hf.mamba_d_conv,
        (bias, bool(hf.projectors_bias)), bool(hf.mamba_conv_bias), norm, scales, out_by_name=True,
    )  # fmt: skip


def _numbers(hf: Fields, name: str, count: int) -> tuple[float, ...]:
    found = getattr(hf, name)
    if len(found) != count:
        hf.fail(f"{name} has {len(found)} numbers, not {count}", "correct it")
    return tuple(found)


FAMILY = Family(
    ("falcon_h1",),
    read,
    reads=LLAMA_FIELDS
    | MAMBA_FIELDS
    | frozenset(
        """attention_bias mlp_bias projectors_bias mamba_d_ssm mamba_rms_norm mamba_norm_before_gate mlp_multipliers
        ssm_multipliers ssm_in_multiplier ssm_out_multiplier attention_in_multiplier attention_out_multiplier
        key_multiplier embedding_multiplier lm_head_multiplier""".split()
    ),
    fixed={"hidden_act": "silu", "attention_dropout": 0.0, "mamba_use_mlp": True},
    harmless=MAMBA_HARMLESS | {"num_logits_to_keep"},
    files=LLAMA_FILES,
    optional=frozenset({"mamba_d_ssm"}),
    published=("Falcon-H1-0.5B-Instruct",),
)
