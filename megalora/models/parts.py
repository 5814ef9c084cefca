"""Parts of specs that many families share: each takes the fields of a config and names as the file has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megalora.models.family import Fields
from megalora.models.routers import Router
from megalora.models.spec import (
    MLP,
    Alibi,
    Attention,
    Blocked,
    ClassHead,
    Embedding,
    FileNames,
    Fused,
    Head,
    Layer,
    Linear,
    Mixer,
    ModelSpec,
    Norm,
    Residual,
    Stack,
    TaskHead,
)

# What the fields of a llama-shaped config are called, and those with which its attention could be another.
LLAMA_FIELDS = frozenset(
    """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size
    rms_norm_eps max_position_embeddings tie_word_embeddings classifier_dropout""".split()
)
LLAMA_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
LLAMA_FILES = FileNames(prefix="model.")
CLASSES = 2  # of a classification head until the task says how many there are


def head_dim(hf: Fields) -> int:
    """Return `head_dim`, or the share of hidden_size that a head has."""
    own = hf.head_dim if hf.reads("head_dim") else None
    size, heads = hf.hidden_size, hf.num_attention_heads
    if own is None and size < heads:
        hf.fail(f"hidden_size ({size}) is less than num_attention_heads ({heads}): correct it")
    return own or size // heads


def kv_heads(hf: Fields) -> int:
    """Return num_key_value_heads, by default as many as query heads. Raises UserError where it does not divide them."""
    count = hf.num_key_value_heads or hf.num_attention_heads
    if hf.num_attention_heads % count:
        hf.fail(
            f"num_attention_heads ({hf.num_attention_heads}) is not a multiple of num_key_value_heads ({count})",
            "correct it",
        )
    return count


def rms(hf: Fields, name: str, size: int | None = None, *, precise: bool = False, offset: bool = False) -> Norm:
    """Return an RMSNorm with the config's epsilon, of hidden_size features unless said otherwise."""
    return Norm(name, size or hf.hidden_size, hf.rms_norm_eps, precise=precise, offset=offset)


def layer_windows(hf: Fields) -> tuple[int | None, ...]:
    """Return each layer's window: sliding_window where its `layer_types` says sliding_attention."""
    return tuple(hf.sliding_window if slides else None for slides in sliding_layers(hf, hf.layer_types))


def sliding_layers(hf: Fields, kinds: Sequence[str] | None) -> tuple[bool, ...]:
    """Return whether each layer's window slides, by its kind in `layer_types`. Raises UserError for another kind."""
    if kinds is None or len(kinds) != hf.num_hidden_layers:
        hf.fail(f"layer_types has {len(kinds or ())} entries for {hf.num_hidden_layers} layers", "correct it")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            hf.fail(
                f"layer_types has {kind!r}, which is not implemented",
                "take a model with full_attention and sliding_attention",
            )
    return tuple(kind == "sliding_attention" for kind in kinds)


def layer_norms(size: int, eps: float, bias: bool = True) -> Callable[[str], Norm]:
    """Return what makes LayerNorms of `size` features by name."""
    return lambda name: Norm(name, size, eps, "layer", bias=bias)


def alibi(heads: int, bias_max: float = 8.0, rounded: bool = False) -> Alibi:
    """Return ALiBi's positions for so many heads (Press et al. 2022; heads that are no power of two as in BLOOM)."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-bias_max * i / (2 * power)) for i in range(1, 2 * (heads - power) + 1, 2)]
    return Alibi(tuple(slopes), rounded)


def norms_over_heads(hf: Fields, *, precise: bool = False) -> dict[str, Any]:
    """Return q_norm and k_norm of an Attention: RMSNorm over all heads of q together, and over those of k."""
    heads = {"q": hf.num_attention_heads, "k": kv_heads(hf)}
    return {
        f"{name}_norm": rms(hf, f"self_attn.{name}_norm", count * head_dim(hf), precise=precise)
        for name, count in heads.items()
    }


def grouped_attention(
    hf: Fields,
    *,
    bias: bool = False,
    out_bias: bool = False,
    window: int | None = None,
    qk_norm: bool = False,
    rotates: bool = True,
    interleaved: bool = False,
    **more: Any,
) -> Attention:
    """Return llama's attention: q, k, v and o apart, key/value heads shared by groups of query heads.

    qk_norm  RMSNorm over each head of q and k; rotates: with positions; more: further fields of Attention
    """
    heads, kv, dim, size = hf.num_attention_heads, kv_heads(hf), head_dim(hf), hf.hidden_size
    q, k, v = (
        Linear(f"self_attn.{name}_proj", size, count * dim, bias)
        for name, count in (("q", heads), ("k", kv), ("v", kv))
    )
    if qk_norm:
        more |= {f"{name}_norm": rms(hf, f"self_attn.{name}_norm", dim) for name in "qk"}
    out = Linear("self_attn.o_proj", heads * dim, size, out_bias)
    position = hf.rotary(dim, sliding=window is not None, interleaved=interleaved) if rotates else None
    return Attention(q, k, v, out, heads, kv, dim, position, window, **more)


def fused(
    name: str,
    in_features: int,
    parts: Sequence[tuple[str, int]],
    size: int = 1,
    bias: bool = False,
    transposed: bool = False,
) -> Fused:
    """Return one linear of several outputs, one after another: (name, units of `size` rows) each."""
    rows = size * sum(units for _, units in parts)
    return Fused(Linear(name, in_features, rows, bias, transposed), Blocked(tuple(parts), size))


def gated_mlp(
    hf: Fields,
    bias: bool = False,
    *,
    at: str = "mlp",
    inner: int | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    act: str = "silu",
) -> MLP:
    """Return llama's MLP: gate, up and down apart, below `at`, with `inner` features between (intermediate_size)."""
    size, inner = hf.hidden_size, inner or hf.intermediate_size
    gate, up, down = (f"{at}.{name}" for name in names)
    return MLP(
        Linear(up, size, inner, bias), Linear(down, inner, size, bias), inner, act, Linear(gate, size, inner, bias)
    )


def plain_mlp(
    hf: Fields,
    up: str,
    down: str,
    inner: int,
    act_field: str | None = None,
    *,
    act: str | None = None,
    bias: bool = True,
    transposed: bool = False,
) -> MLP:
    """Return down(act(up)) of these names. act_field: the config's field that names the activation; or `act` itself."""
    size = hf.hidden_size
    return MLP(
        Linear(up, size, inner, bias, transposed),
        Linear(down, inner, size, bias, transposed),
        inner,
        act or hf.activation_of(act_field),
    )


# Fields of the loss that balances experts, which is part of the loss only where output_router_logits is true.
ROUTER_FIXED = {"output_router_logits": False}
ROUTER_HARMLESS = frozenset({"router_aux_loss_coef"})


def router(
    hf: Fields, name: str, count: int, *, bias: bool = False, top: int | None = None, **how: Any
) -> Router:  # fmt: skip
    """Return a router that chooses `top`, or num_experts_per_tok, of `count` experts. Raises UserError for more."""
    top = hf.num_experts_per_tok if top is None else top
    if top > count:
        hf.fail(f"num_experts_per_tok ({top}) is more than the number of experts ({count})", "correct it")
    if top < 1:
        hf.fail(f"num_experts_per_tok = {top} is not valid: give a whole number from 1")
    return Router(Linear(name, hf.hidden_size, count, bias), top, **how)


def sparse_layers(hf: Fields) -> tuple[bool, ...]:
    """Return whether each layer has experts, by mlp_only_layers and decoder_sparse_step (Qwen)."""
    dense, step = set(hf.mlp_only_layers or ()), hf.decoder_sparse_step
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(hf.num_hidden_layers))


def llama_like(hf: Fields, attention: Callable[[int], Mixer], mlp: Mixer | Callable[[int], Mixer]) -> ModelSpec:
    """Return a decoder with llama's names, RMSNorms and sequential residuals.

    attention  of each layer; mlp: of all layers, or of each
    """

    def layer(index: int) -> Layer:
        return (
            Residual(attention(index), rms(hf, "input_layernorm")),
            Residual(mlp(index) if callable(mlp) else mlp, rms(hf, "post_attention_layernorm")),
        )

    return llama_ends(hf, layer, rms(hf, "model.norm"))


def llama_ends(hf: Fields, layer: Callable[[int], Layer], norm: Norm, dropout: float = 0.0) -> ModelSpec:
    """Return a decoder of these layers with llama's names; norm: behind the last layer; dropout: of the embedding."""
    stack = Stack("model.layers", tuple(map(layer, range(hf.num_hidden_layers))), norm)
    return decoder(hf, stack, embedding="model.embed_tokens", head="lm_head", dropout=dropout)


def head_start(hf: Fields) -> tuple[int, int | None]:
    """Return the token that a decoder begins with, and the one that it is made to write first (None: none).

    Raises UserError where the config names no token to begin with.
    """
    start = hf.decoder_start_token_id
    start = hf.pad_token_id if start is None else start  # as transformers shifts labels of T5
    if not isinstance(start, int):
        hf.fail("decoder_start_token_id is missing: take config.json from the model's own folder")
    return start, hf.forced_bos_token_id


def scaled_ends(
    spec: ModelSpec,
    *,
    embedding: float = 1.0,
    rounded: bool = False,
    logits: float = 1.0,
    softcap: float | None = None,
) -> ModelSpec:
    """Return `spec` with the rows of the embedding and the logits multiplied by numbers, and logits capped."""
    assert isinstance(spec.head, Head)
    return replace(
        spec,
        embedding=replace(spec.embedding, scale=embedding, rounded=rounded),
        head=replace(spec.head, scale=logits, softcap=softcap),
    )


def decoder(
    hf: Fields, stack: Stack, *, embedding: str, head: str, token_head: str = "score", dropout: float = 0.0
) -> ModelSpec:
    """Return the spec of a decoder-only model from its stack and the names of its ends.

    token_head  what transformers calls its head for token classification
    dropout     of the embedding
    """
    return ModelSpec(
        Embedding(embedding, hf.vocab_size, hf.hidden_size, dropout=dropout),
        stack,
        Head(head, bool(hf.tie_word_embeddings)),
        hf.max_position_embeddings,
        task_heads=decoder_heads(hf, token_head),
    )


def decoder_heads(hf: Fields, token_head: str = "score", sequence_head: str = "score") -> tuple[TaskHead, ...]:
    """Return the classification heads that transformers gives every decoder, with its defaults.

    The dropout before the token head is classifier_dropout, else hidden_dropout, else 0.1.
    The score of a sequence is that of its last token, without bias or dropout.
    """
    fields = (getattr(hf, name) for name in ("classifier_dropout", "hidden_dropout") if hf.reads(name))
    dropout = next((float(own) for own in fields if own is not None), 0.1)
    return (
        TaskHead("TOKEN_CLS", ClassHead(Linear(token_head, hf.hidden_size, CLASSES, bias=True), dropout)),
        TaskHead("SEQ_CLS", ClassHead(Linear(sequence_head, hf.hidden_size, CLASSES))),
    )
