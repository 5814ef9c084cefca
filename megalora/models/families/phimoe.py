"""Phi-3.5-MoE: Mixtral with LayerNorms and biases, experts as in evaluation, without the draw and noise of training.

In training transformers draws the experts of a token at random, and estimates the gradient of that draw, for the
router to learn from it. Routers are frozen here: the experts are those that the model takes when it is used, and the
gradient is that of their weights. Neither are inputs multiplied by noise.
"""

from dataclasses import replace

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    ROUTER_HARMLESS,
    gated_mlp,
    grouped_attention,
    layer_norms,
    llama_ends,
    router,
)
from megalora.models.spec import Attention, Experts, Head, Layer, ModelSpec, Residual, Rotary


def read(hf: Fields) -> ModelSpec:
    count, norm = hf.num_local_experts, layer_norms(hf.hidden_size, hf.rms_norm_eps)
    if hf.num_experts_per_tok != 2:
        hf.fail(f"num_experts_per_tok = {hf.num_experts_per_tok} is not implemented", "take a model with 2")
    expert = gated_mlp(hf, at="block_sparse_moe.experts.{expert}", names=("w1", "w3", "w2"))
    choice = router(hf, "block_sparse_moe.gate", count, by_logits=True, jitter=hf.router_jitter_noise)
    attention, experts = _attention(hf), Experts(choice, count, expert)

    def layer(index: int) -> Layer:
        return (Residual(attention, norm("input_layernorm")), Residual(experts, norm("post_attention_layernorm")))

    spec = llama_ends(hf, layer, norm("model.norm"))
    assert isinstance(spec.head, Head)
    return replace(spec, head=replace(spec.head, bias=bool(hf.lm_head_bias)))


def _attention(hf: Fields) -> Attention:
    bias, rope = bool(hf.attention_bias), hf.rope
    found = grouped_attention(hf, bias=bias, out_bias=bias, window=hf.sliding_window)
    if rope["rope_type"] == "default":
        return found
    factors = {rope.get(name) for name in ("short_mscale", "long_mscale")}
    factor = factors.pop()
    if factors or factor is None:
        hf.fail("short_mscale and long_mscale of its rope fields must be one number", "take a model where they are")
    assert isinstance(found.position, Rotary)
    return replace(found, position=replace(found.position, factor=float(factor)))


FAMILY = Family(
    ("phimoe",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """sliding_window num_local_experts num_experts_per_tok attention_bias lm_head_bias
        router_jitter_noise""".split()
    ),
    fixed=LLAMA_FIXED | ROUTER_FIXED,
    harmless=ROUTER_HARMLESS | {"input_jitter_noise", "original_max_position_embeddings"},
    rope_reads=frozenset({"short_mscale", "long_mscale"}),
    theta=1e6,
    files=LLAMA_FILES,
    published=("Phi-3.5-MoE-instruct",),
)
