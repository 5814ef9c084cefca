"""gpt-oss (gpt-oss-20b, gpt-oss-120b): attention with sinks, windows in every other layer, clamped experts."""

from megalora.models.family import Family, Fields
from megalora.models.parts import (
    LLAMA_FIELDS,
    LLAMA_FILES,
    LLAMA_FIXED,
    ROUTER_FIXED,
    ROUTER_HARMLESS,
    grouped_attention,
    layer_windows,
    llama_ends,
    rms,
    router,
)
from megalora.models.spec import MLP, ByHead, Clamp, Experts, Fused, Layer, Linear, ModelSpec, Residual

ALPHA, LIMIT = 1.702, 7.0  # where config.json leaves them out, as the published ones do with alpha


def read(hf: Fields) -> ModelSpec:
    size, inner, count, bias = hf.hidden_size, hf.intermediate_size, hf.num_local_experts, bool(hf.attention_bias)
    at, windows = "mlp.experts.{expert}.", layer_windows(hf)
    gate_up = Fused(Linear(f"{at}gate_up_proj", size, 2 * inner, True, transposed=True), ByHead(1, ("gate", "up")))
    down = Linear(f"{at}down_proj", inner, size, True, transposed=True)
    clamp = Clamp(hf.swiglu_alpha or ALPHA, hf.swiglu_limit or LIMIT)
    expert = MLP(gate_up, down, inner, "silu", gate_up, clamp=clamp)
    choice = router(hf, "mlp.router", count, bias=True, by_logits=True, renormalise=True)
    experts = Experts(choice, count, expert, stacked=True)

    def layer(index: int) -> Layer:
        attention = grouped_attention(hf, bias=bias, out_bias=bias, window=windows[index], sinks="self_attn.sinks")
        return (
            Residual(attention, rms(hf, "input_layernorm", precise=True)),
            Residual(experts, rms(hf, "post_attention_layernorm", precise=True)),
        )

    return llama_ends(hf, layer, rms(hf, "model.norm", precise=True))


FAMILY = Family(
    ("gpt_oss",),
    read,
    reads=LLAMA_FIELDS
    | frozenset(
        """num_local_experts num_experts_per_tok sliding_window layer_types attention_bias swiglu_alpha
        swiglu_limit""".split()
    ),
    optional=frozenset(("swiglu_alpha", "swiglu_limit")),
    fixed=LLAMA_FIXED | ROUTER_FIXED,
    harmless=ROUTER_HARMLESS | {"initial_context_length"},
    theta=150000.0,
    scaled=True,
    aliases={"experts_per_token": "num_experts_per_tok"},
    files=LLAMA_FILES,
)
