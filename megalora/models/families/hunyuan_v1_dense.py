"""Hunyuan dense (0.5B to 7B, Hunyuan-MT): llama with RMSNorm on each head behind its rotation, stretched by alpha."""

from dataclasses import replace

from megalora.models import rotary
from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    gated_mlp,
    grouped_attention,
    head_dim,
    llama_like,
    rms,
)
from megalora.models.spec import Attention, ModelSpec, Rotary


def stretched(hf: Fields, alpha: float) -> Rotary:
    """Return the rotation of rope_type dynamic with a fixed `alpha`: theta is multiplied by alpha ** (dim / (dim - 2)).

    Raises UserError for another rope_type, whose formula has no alpha, and for heads that are too small for this one.
    """
    dim, kind = head_dim(hf), hf.rope["rope_type"]
    if kind != "dynamic" or dim < 4:
        said = f"alpha = {alpha} with rope_type = {kind!r} and heads of {dim} features"
        hf.fail(f"{said} is not implemented", "take config.json from the model's own folder")
    theta = hf.rope["rope_theta"] * alpha ** (dim / (dim - 2))
    return rotary.rotary({"rope_type": "default", "rope_theta": theta}, dim, None, hf.where)


def attention_of(hf: Fields) -> Attention:
    """Return Hunyuan's attention."""
    bias, alpha = hf.attention_bias, hf.rope.get("alpha")
    q, k = (rms(hf, f"self_attn.{name}_layernorm", head_dim(hf)) for name in ("query", "key"))
    attention = grouped_attention(
        hf, bias=bias, out_bias=bias, rotates=alpha is None, q_norm=q, k_norm=k, turns_first=True
    )
    if alpha is not None:
        attention = replace(attention, position=stretched(hf, alpha))
    return attention


def read(hf: Fields) -> ModelSpec:
    attention = attention_of(hf)
    return llama_like(hf, lambda layer: attention, gated_mlp(hf))


FAMILY = Family(
    ("hunyuan_v1_dense",),
    read,
    reads=LLAMA_FIELDS | {"attention_bias"},
    fixed=LLAMA_FIXED
    | {
        "mlp_bias": False, "use_qk_norm": True, "use_rotary_pos_emb": True, "use_cla": False,
        "position_embedding_xdrope": False, "add_classification_head": False,
    },  # fmt: skip
    harmless=frozenset({"attention_head_dim", "eod_token_id", "cla_share_factor"}),
    rope_reads=frozenset({"alpha"}),
    rope_harmless=frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}),
    files=LLAMA_FILES,
    published=("Hunyuan-MT-7B",),
)
