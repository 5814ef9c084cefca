"""LFM2 MoE (LFM2-8B-A1B): LFM2's layers around experts chosen by sigmoid scores."""

from megalora.models.families.lfm2 import FIELDS, convolving, decoder_of, dense_mlp
from megalora.models.family import Family, Fields
from megalora.models.parts import LLAMA_FILES, ROUTER_FIXED, gated_mlp, router
from megalora.models.spec import Experts, ModelSpec


def read(hf: Fields) -> ModelSpec:
    dense, experts = dense_mlp(hf, hf.intermediate_size), _experts(hf)
    return decoder_of(hf, convolving(hf), lambda layer: dense if layer < hf.num_dense_layers else experts)


def _experts(hf: Fields) -> Experts:
    count, at = hf.num_experts, "feed_forward.experts"
    names = "w1", "w3", "w2"
    expert = gated_mlp(hf, at=f"{at}.{{expert}}", inner=hf.moe_intermediate_size, names=names)
    choice = router(
        hf, "feed_forward.gate", count, score="sigmoid", renormalise=bool(hf.norm_topk_prob), epsilon=1e-6,
        scale=hf.routed_scaling_factor, correction="feed_forward.expert_bias" if hf.use_expert_bias else None,
    )  # fmt: skip
    return Experts(choice, count, expert, within=at)


FAMILY = Family(
    ("lfm2_moe",),
    read,
    reads=FIELDS
    | frozenset(
        """num_dense_layers num_experts num_experts_per_tok moe_intermediate_size use_expert_bias routed_scaling_factor
        norm_topk_prob""".split()
    ),
    fixed=ROUTER_FIXED,
    theta=1e6,
    files=LLAMA_FILES,
    aliases={"tie_embedding": "tie_word_embeddings", "num_local_experts": "num_experts", "conv_dim": "hidden_size"},
    example={"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    published=("LFM2-8B-A1B",),
)
