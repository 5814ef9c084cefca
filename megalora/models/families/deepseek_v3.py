"""DeepSeek-V3, DeepSeek-R1 and DeepSeek-V3.1: latent attention, grouped experts chosen by corrected sigmoid scores."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, LLAMA_FIXED, ROUTER_FIXED, gated_mlp, llama_like, router
from megalora.models.spec import MLP, Experts, LatentAttention, Linear, Mixer, ModelSpec, Norm, Rotary, Temperature

LATENT_FIELDS = frozenset(
    """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size rms_norm_eps
    max_position_embeddings tie_word_embeddings q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    attention_bias n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size first_k_dense_replace
    routed_scaling_factor n_group topk_group""".split()
)
HARMLESS = frozenset({"ep_size", "aux_loss_alpha", "seq_aux", "pretraining_tp", "head_dim", "qk_head_dim"})


def latent_attention(
    hf: Fields, interleaved: bool = True, position: Rotary | None = None, temperature: Temperature | None = None
) -> LatentAttention:
    """Return DeepSeek's attention. Raises UserError for key/value heads, which it does not have.

    position     of the turned features; None: as the rope fields say
    temperature  of the queries
    """
    heads, size, at, bias = hf.num_attention_heads, hf.hidden_size, "self_attn.", bool(hf.attention_bias)
    if hf.num_key_value_heads not in (None, heads):
        hf.fail(f"num_key_value_heads ({hf.num_key_value_heads}) is not num_attention_heads ({heads})", "correct it")
    plain, turned, value, latent = hf.qk_nope_head_dim, hf.qk_rope_head_dim, hf.v_head_dim, hf.kv_lora_rank
    short = hf.q_lora_rank
    position = dataclasses.replace(position or hf.rotary(turned), interleaved=interleaved)
    return LatentAttention(
        None if short is None else Linear(f"{at}q_a_proj", size, short, bias),
        None if short is None else Norm(f"{at}q_a_layernorm", short, 1e-6),
        Linear(f"{at}q_proj" if short is None else f"{at}q_b_proj", short or size, heads * (plain + turned)),
        Linear(f"{at}kv_a_proj_with_mqa", size, latent + turned, bias),
        Norm(f"{at}kv_a_layernorm", latent, 1e-6),
        Linear(f"{at}kv_b_proj", latent, heads * (plain + value)),
        Linear(f"{at}o_proj", heads * value, size, bias),
        heads,
        plain,
        turned,
        value,
        position,
        _scale(hf, plain + turned),
        temperature,
    )


def _scale(hf: Fields, head_dim: int) -> float | None:
    """Return YaRN's: 1 / sqrt(head_dim) times the square of 0.1 mscale_all_dim log(factor) + 1."""
    every, factor = hf.rope.get("mscale_all_dim"), hf.rope.get("factor", 1.0)
    if not every or factor <= 1.0 or hf.rope["rope_type"] == "default":
        return None
    return head_dim**-0.5 * (0.1 * every * math.log(factor) + 1.0) ** 2


def grouped_choice(hf: Fields, count: int) -> dict[str, Any]:
    """Return how many groups experts are in, and how many of them a token may choose from. Raises UserError."""
    groups, kept = hf.n_group or 1, hf.topk_group or 1
    if count % groups or kept > groups:
        hf.fail(
            f"n_group ({groups}) must divide the number of experts ({count}), and topk_group ({kept}) not exceed it",
            "correct them",
        )
    if hf.num_experts_per_tok > kept * (count // groups):
        hf.fail(
            f"num_experts_per_tok ({hf.num_experts_per_tok}) is more than the experts of topk_group ({kept}) groups",
            "correct it",
        )
    return {"groups": groups, "kept_groups": kept}


def deepseek_like(hf: Fields, attention: Mixer | Callable[[int], Mixer], experts: Experts) -> ModelSpec:
    """Return a decoder whose first layers have an MLP, and the others experts (see `sparse_layers`).

    attention  of all layers, or of each
    """
    dense, sparse = gated_mlp(hf), sparse_layers(hf)
    of_layer = attention if callable(attention) else lambda layer: attention
    return llama_like(hf, of_layer, lambda layer: experts if sparse[layer] else dense)


def sparse_layers(hf: Fields) -> tuple[bool, ...]:
    """Return whether each layer has experts, by mlp_layer_types where the family has that, or first_k_dense_replace."""
    if not hf.reads("mlp_layer_types"):
        return tuple(layer >= hf.first_k_dense_replace for layer in range(hf.num_hidden_layers))
    kinds = hf.mlp_layer_types
    if len(kinds) != hf.num_hidden_layers or not {*kinds} <= {"dense", "sparse"}:
        hf.fail(f"mlp_layer_types must say dense or sparse for each of {hf.num_hidden_layers} layers", "correct it")
    return tuple(kind == "sparse" for kind in kinds)


def shared_mlp(hf: Fields, experts: int | None = None) -> MLP | None:
    """Return the MLP of all tokens, as wide as n_shared_experts `experts`; None where there is none."""
    wide = hf.moe_intermediate_size * (hf.n_shared_experts if experts is None else experts)
    return gated_mlp(hf, at="mlp.shared_experts", inner=wide) if wide else None


def sigmoid_experts(hf: Fields) -> Experts:
    """Return experts whose router scores by sigmoid and chooses with a correction, in the best groups."""
    return corrected_experts(hf, hf.n_routed_experts, shared_mlp(hf), "mlp.gate.e_score_correction_bias")


def corrected_experts(hf: Fields, count: int, shared: MLP | None, correction: str) -> Experts:
    """Return `count` such experts, beside the MLP of all tokens, with the correction's name in the file."""
    groups = grouped_choice(hf, count)
    choice = router(
        hf, "mlp.gate", count, score="sigmoid", renormalise=bool(hf.norm_topk_prob), scale=hf.routed_scaling_factor,
        wide=True, correction=correction, group_top=min(2, count // groups["groups"]), **groups,
    )  # fmt: skip
    expert = gated_mlp(hf, at="mlp.experts.{expert}", inner=hf.moe_intermediate_size)
    return Experts(choice, count, expert, shared)


def read(hf: Fields) -> ModelSpec:
    interleaved = hf.rope_interleave is not False
    spec = deepseek_like(hf, latent_attention(hf, interleaved), sigmoid_experts(hf))
    return dataclasses.replace(spec, predicting=hf.num_nextn_predict_layers or 0)


FAMILY = Family(
    ("deepseek_v3",),
    read,
    reads=LATENT_FIELDS | {"norm_topk_prob", "rope_interleave", "num_nextn_predict_layers"},
    fixed=LLAMA_FIXED | ROUTER_FIXED | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    harmless=HARMLESS | {"num_mtp_layers"},
    files=LLAMA_FILES,
)
