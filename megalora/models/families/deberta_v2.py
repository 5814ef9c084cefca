"""DeBERTa-v2 and DeBERTa-v3: DeBERTa with q, k and v apart, which may read positions too; far ones share their rows."""

from dataclasses import replace

from megalora.models.deberta import deberta, deberta_family, disentangled, furthest, scale
from megalora.models.family import Fields
from megalora.models.parts import head_dim, layer_norms
from megalora.models.spec import Attention, Linear, ModelSpec


def read(hf: Fields) -> ModelSpec:
    return deberta(hf, lambda terms: _attention(hf, terms))


def _attention(hf: Fields, terms: tuple[str, ...]) -> Attention:
    size, heads, at, shared = hf.hidden_size, hf.num_attention_heads, "attention.self", bool(hf.share_att_key)
    q, k, v, key, query = (
        Linear(f"{at}.{name}_proj", size, size, True) for name in ("query", "key", "value", "pos_key", "pos_query")
    )
    longest, buckets, normed = furthest(hf), hf.position_buckets or -1, _normed(hf)
    if buckets > 0 and not 4 <= buckets <= 2 * (longest - 2):
        hf.fail(f"position_buckets = {buckets} does not fit max_relative_positions ({longest})", "correct them")
    position = disentangled(
        *(hf, terms, k if shared else key, q if shared else query, buckets if buckets > 0 else longest),
        shared=shared,
        furthest=longest if buckets > 0 else None,
        norm=layer_norms(size, hf.layer_norm_eps)("deberta.encoder.LayerNorm") if normed else None,
    )
    out, dropout = Linear("attention.output.dense", size, size, True), hf.attention_probs_dropout_prob
    return Attention(
        q, k, v, out, heads, heads, head_dim(hf), position, scale=scale(hf, terms), causal=False, dropout=dropout
    )


def _normed(hf: Fields) -> bool:
    """Return whether the table of positions is normed."""
    kinds = {kind.strip() for kind in (hf.norm_rel_ebd or "none").lower().split("|")}
    if not kinds <= {"none", "layer_norm"}:
        hf.fail(f"norm_rel_ebd = {hf.norm_rel_ebd!r} is not implemented", "take a model with none or layer_norm")
    return "layer_norm" in kinds


_SAME = deberta_family(
    "deberta-v2",
    read,
    {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 256,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
)
FAMILY = replace(
    _SAME,
    reads=_SAME.reads | {"position_buckets", "share_att_key", "norm_rel_ebd"},
    fixed={**_SAME.fixed, "conv_kernel_size": 0},
    harmless=_SAME.harmless | {"conv_act", "conv_groups"},
    optional=_SAME.optional | {"position_buckets", "norm_rel_ebd"},
)
