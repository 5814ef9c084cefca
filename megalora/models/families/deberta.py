"""DeBERTa: an encoder whose scores know content and position apart; q, k and v are one linear."""

from megalora.models.deberta import deberta, deberta_family, disentangled, furthest, scale
from megalora.models.family import Fields
from megalora.models.parts import head_dim
from megalora.models.spec import Attention, ByHead, Fused, Linear, ModelSpec


def read(hf: Fields) -> ModelSpec:
    return deberta(hf, lambda terms: _attention(hf, terms))


def _attention(hf: Fields, terms: tuple[str, ...]) -> Attention:
    size, heads, dim, at = hf.hidden_size, hf.num_attention_heads, head_dim(hf), "attention.self"
    qkv = Fused(Linear(f"{at}.in_proj", size, 3 * size), ByHead(dim))
    key, query = Linear(f"{at}.pos_proj", size, size), Linear(f"{at}.pos_q_proj", size, size, True)
    return Attention(
        *(qkv, qkv, qkv, Linear("attention.output.dense", size, size, True)),
        *(heads, heads, dim, disentangled(hf, terms, key, query, furthest(hf))),
        scale=scale(hf, terms),
        causal=False,
        dropout=hf.attention_probs_dropout_prob,
        q_bias=f"{at}.q_bias",
        v_bias=f"{at}.v_bias",
    )


FAMILY = deberta_family(
    "deberta",
    read,
    {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
)
