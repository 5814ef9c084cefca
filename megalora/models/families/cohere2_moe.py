"""Cohere MoE: Command A's layers with experts beside the attention, behind layers without."""

from megalora.models.families.cohere import FIELDS, decoder_of
from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    gated_mlp,
    grouped_attention,
    layer_windows,
    rms,
    router,
)
from megalora.models.spec import Attention, Experts, Mixer, ModelSpec, Norm

_SHARES = {"sum": 1.0, "average": 0.5}  # of experts, and of the MLP of all tokens, in what both add


def experts_of(hf: Fields) -> Experts:
    """Return the experts, chosen by logits, and the MLP of all tokens. Raises UserError for others."""
    count, shared, how = hf.num_experts, hf.num_shared_experts, hf.shared_expert_combination_strategy
    score = hf.expert_selection_fn
    if score not in ("softmax", "sigmoid"):
        hf.fail(f"expert_selection_fn = {score!r} is not implemented", "take a model with softmax or sigmoid")
    if how not in _SHARES:
        hf.fail(f"shared_expert_combination_strategy = {how!r} is not implemented", "take a model with sum or average")
    share = _SHARES[how] if shared else 1.0
    choice = router(
        hf, "mlp.gate", count, score=score, by_logits=True, scale=share,
        renormalise=score == "softmax" or bool(hf.norm_topk_prob),
    )  # fmt: skip
    every = gated_mlp(hf, at="mlp.shared_experts", inner=hf.intermediate_size * shared) if shared else None
    return Experts(choice, count, gated_mlp(hf, at="mlp.experts.{expert}"), every, shared_scale=share)


def read(hf: Fields) -> ModelSpec:
    windows, kinds, bias = layer_windows(hf), hf.mlp_layer_types, bool(hf.attention_bias)
    if len(kinds) != hf.num_hidden_layers or not {*kinds} <= {"dense", "sparse"}:
        hf.fail(f"mlp_layer_types must say dense or sparse for each of {hf.num_hidden_layers} layers", "correct it")
    dense = gated_mlp(hf, inner=hf.prefix_dense_intermediate_size)
    sparse = experts_of(hf) if "sparse" in kinds else dense

    def attention(index: int) -> Attention:
        always = kinds[index] == "dense" and hf.prefix_dense_sliding_window_pattern == 1
        rotates = windows[index] is not None or always
        return grouped_attention(
            hf, bias=bias, out_bias=bias, window=windows[index], rotates=rotates, interleaved=True
        )  # fmt: skip

    def mlp(index: int) -> Mixer:
        return dense if kinds[index] == "dense" else sparse

    def norm(name: str) -> Norm:
        return rms(hf, name)

    return decoder_of(hf, attention, mlp, None if hf.rms_norm_eps is None else norm)


FAMILY = Family(
    ("cohere2_moe",),
    read,
    reads=FIELDS
    | frozenset(
        """head_dim layer_types sliding_window mlp_layer_types num_experts num_experts_per_tok num_shared_experts
        shared_expert_combination_strategy expert_selection_fn norm_topk_prob prefix_dense_intermediate_size
        prefix_dense_sliding_window_pattern rms_norm_eps""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED,
    # layer_types and mlp_layer_types say what these do.
    harmless=frozenset({"sliding_window_pattern", "first_k_dense_replace", "cache_implementation"}),
    optional=frozenset({"rms_norm_eps", "prefix_dense_intermediate_size"}),
    files=LLAMA_FILES,
)
