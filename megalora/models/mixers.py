"""Norms, positions and mixers of a spec. No torch here.

To add a kind, add its dataclass here, its block in megalora/models/blocks and its counts in megalora/planning/nodes.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megalora.models.linears import Fused, Linear, Projection, linears_of
from megalora.models.routers import Router


@dataclass(frozen=True)
class Norm:
    """A normalisation of the last `size` features, with frozen weights.

    kind     "rms": RMSNorm; "layer": LayerNorm
    bias     a bias beside the weight (LayerNorm)
    offset   the weight is 1 + what the file has (gemma, nemotron)
    precise  the weight is applied in float32, before the result is rounded to the compute dtype; else after (RMSNorm)
    heads    so many weights, one for each head of q or k: [heads, size] (cohere); 0: one for all
    apart    each head's weight is a tensor of its own, `{name}.{head}.weight` [size] (stablelm)
    weighted there is a weight; else the file has nothing of it
    """

    name: str
    size: int
    eps: float
    kind: str = "rms"
    bias: bool = False
    offset: bool = False
    precise: bool = False
    heads: int = 0
    apart: bool = False
    weighted: bool = True

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor in the file."""
        if not self.weighted:
            return
        if self.apart:
            yield from ((f"{self.name}.{head}.weight", (self.size,)) for head in range(self.heads))
            return
        shape = (self.heads, self.size) if self.heads else (self.size,)
        yield f"{self.name}.weight", shape
        if self.bias:
            yield f"{self.name}.bias", shape


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: an angle is position * frequency; the first n features of a head rotate, in pairs.

    inverse_frequencies  [n / 2] float32 values
    factor               what cos and sin are multiplied by (YaRN, longrope; 1 elsewhere)
    interleaved          pairs are neighbours (x[2 j], x[2 j + 1]); else halves (x[j], x[j + n / 2])
    long, long_from      other frequencies for documents of more than `long_from` tokens (longrope)
    only_to              a longer document would need frequencies that depend on its length (dynamic NTK); None: any
    """

    inverse_frequencies: tuple[float, ...]
    factor: float = 1.0
    interleaved: bool = False
    long: tuple[float, ...] | None = None
    long_from: int = 0
    only_to: int | None = None

    @property
    def size(self) -> int:
        """n, the features that rotate."""
        return 2 * len(self.inverse_frequencies)


@dataclass(frozen=True)
class Alibi:
    """ALiBi: a score gets -slope * |query - key|; a slope for each query head.

    rounded  the slopes, and their products with the key's position, are rounded to bfloat16, and added before the
             scores are scaled (Falcon)
    """

    slopes: tuple[float, ...]
    rounded: bool = False


@dataclass(frozen=True)
class RelativeTable:
    """A learned bias of each score, by query head and bucket of key - query; frozen (T5).

    name       `{name}.weight` [buckets, heads] in full: the layers of a stack share it
    longest    distances from here on share the last bucket
    both_ways  keys behind the query have half of the buckets; else that of distance 0
    """

    name: str
    buckets: int
    longest: int
    both_ways: bool

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Disentangled:
    """Scores of content against position (DeBERTa): beside q . k a score gets q . K(r) and k . Q(r), where r is the row
    of query - key in a frozen table, and K and Q are linears of that row. All terms are scaled alike.

    name      `{name}.weight` [2 span, size], which all layers share
    span      distances from -span to span - 1 have a row each; farther ones share the outermost
    key, query  K and Q, each of the heads' features; None: there is no such term
    shared    K and Q are the layer's own k and q, adapters included, which are not in the file a second time
    furthest  distances behind span // 2 share rows by their logarithm, up to this one; None: they do not
    norm      of the table's rows
    dropout   of the base, of the table's rows
    """

    name: str
    size: int
    span: int
    key: Linear | None
    query: Linear | None
    shared: bool = False
    furthest: int | None = None
    norm: Norm | None = None
    dropout: float = 0.0

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Those that read the table and nothing else."""
        return () if self.shared else linears_of((self.key, self.query))

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of what the layers share."""
        yield self.weight, (2 * self.span, self.size)
        yield from () if self.norm is None else self.norm.tensors()


Position = Rotary | Alibi | RelativeTable | Disentangled


class Temperature(NamedTuple):
    """q at position p of its document is multiplied by 1 + scale * log(1 + floor((p + first) / step)).

    first  of the count of positions: 1 (llama4) or 0 (ministral3)
    """

    step: float
    scale: float
    first: int = 1


@dataclass(frozen=True)
class Attention:
    """Self-attention over heads.

    q, k, v         a linear each, or the same Fused with parts "q", "k" and "v"; v may be k: what that makes are the
                    values too, before norm and rotation
    position        how scores know positions; None: not at all (NoPE)
    window          a token sees itself and the window - 1 tokens before it; None: all before it. Not causal: as many
                    behind it too
    chunk           a token sees what is before it from the last multiple of `chunk` on, in positions of its document
    q_norm, k_norm  before the rotation: over each head, or where their size is that of all heads over these together
    v_norm          of each head of v, without weights (gemma4)
    turns_first     the rotation comes before q_norm and k_norm
    temperature     of q, behind its norm and rotation; None: 1
    scale           what scores are multiplied by; None: 1 / sqrt(head_dim)
    softcap         a scaled score s becomes softcap * tanh(s / softcap)
    causal          a token sees none behind it
    clip            q, k and v are cut to [-clip, clip], before their norms
    dropout         of the base, of the probabilities in training
    sinks           name of a tensor [heads]: a score of each head that takes its share of the softmax and gives nothing
    q_bias, v_bias  names of tensors [heads head_dim] that are added to q and v: biases that are not the linears' own
    gate            a linear, or fused with q by head: each head's result is multiplied by its sigmoid
    """

    q: Projection
    k: Projection
    v: Projection
    out: Linear
    heads: int
    kv_heads: int
    head_dim: int
    position: Position | None
    window: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    scale: float | None = None
    softcap: float | None = None
    causal: bool = True
    clip: float | None = None
    dropout: float = 0.0
    sinks: str | None = None
    chunk: int | None = None
    turns_first: bool = False
    temperature: Temperature | None = None
    q_bias: str | None = None
    v_bias: str | None = None
    gate: Projection | None = None
    v_norm: Norm | None = None

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of what is neither linear nor norm."""
        if self.sinks is not None:
            yield self.sinks, (self.heads,)
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                yield bias, (self.heads * self.head_dim,)

    @property
    def linears(self) -> tuple[Linear, ...]:
        positions = self.position.linears if isinstance(self.position, Disentangled) else ()
        return (*linears_of((self.gate, self.q, self.k, self.v)), *positions, self.out)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return tuple(norm for norm in (self.q_norm, self.k_norm, self.v_norm) if norm is not None)

    @property
    def one_for_both(self) -> bool:
        """Whether one linear makes keys and values alike."""
        return isinstance(self.k, Linear) and self.v == self.k


@dataclass(frozen=True)
class CrossAttention:
    """Attention of a decoder's tokens to those of their document's source, as the encoder leaves them.

    q        of the decoder's tokens; k, v: of the encoder's
    scale    what scores are multiplied by; None: 1 / sqrt(head_dim)
    dropout  of the base, of the probabilities in training
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear
    heads: int
    head_dim: int
    scale: float | None = None
    dropout: float = 0.0

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.q, self.k, self.v, self.out)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return ()


@dataclass(frozen=True)
class LatentAttention:
    """Causal self-attention whose queries, and keys and values, are made of one short latent a token each (MLA).

    A query head is [plain | turned] features of q_up(q_norm(q_down(x))), or of q_up(x) where there is no q_down. Keys:
    kv_down(x) is [latent | turned]; kv_up(kv_norm(latent)) has for each head [plain | value] features, and all heads
    share the turned ones. The turned features rotate.

    scale  what scores are multiplied by; None: 1 / sqrt(plain + turned)
    temperature  of q, behind its rotation; None: 1
    """

    q_down: Linear | None
    q_norm: Norm | None
    q_up: Linear
    kv_down: Linear
    kv_norm: Norm
    kv_up: Linear
    out: Linear
    heads: int
    plain: int
    turned: int
    value: int
    position: Rotary
    scale: float | None = None
    temperature: Temperature | None = None

    @property
    def head_dim(self) -> int:
        return self.plain + self.turned

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def latent(self) -> int:
        """Features of the latent of keys and values."""
        return self.kv_norm.size

    @property
    def linears(self) -> tuple[Linear, ...]:
        down = () if self.q_down is None else (self.q_down,)
        return (*down, self.q_up, self.kv_down, self.kv_up, self.out)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return tuple(norm for norm in (self.q_norm, self.kv_norm) if norm is not None)


class Clamp(NamedTuple):
    """(up + 1) * gate * sigmoid(alpha * gate), gate cut to at most `limit`, up to [-limit, limit] (gpt_oss)."""

    alpha: float
    limit: float


# HF's names of activations -> their names in megalora.ops.swiglu.
_FUSED_ACTS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class MLP:
    """down(act(gate) * up), or down(act(up)) where there is no gate.

    gate, up  a linear each, or the same Fused with parts "gate" and "up"
    inner     features between
    act       HF's name of the activation
    dropout   of the base, of what down reads
    clamp     what down reads instead, of experts alone
    learned   name of the module that has the numbers of an activation with its own (xIELU), frozen; None: it has none
    gate_scale  what the gate is multiplied by, before the activation
    """

    up: Projection
    down: Linear
    inner: int
    act: str
    gate: Projection | None = None
    dropout: float = 0.0
    clamp: Clamp | None = None
    learned: str | None = None
    gate_scale: float = 1.0

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*linears_of((self.gate, self.up)), self.down)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of what is neither linear nor norm."""
        if self.learned is not None:
            yield from ((f"{self.learned}.{name}", (1,)) for name in ("alpha_p", "alpha_n"))
            yield from ((f"{self.learned}.{name}", ()) for name in ("beta", "eps"))

    @property
    def fused_act(self) -> str | None:
        """The activation's name in megalora.ops.swiglu where that makes what down reads; None where torch does."""
        return None if self.dropout or self.gate_scale != 1.0 else _FUSED_ACTS.get(self.act)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return ()


@dataclass(frozen=True)
class Experts:
    """The weighted sum of the MLPs that a router chooses for a token, and of one that all tokens go through.

    expert       of which each has its own, with {expert} for its index in the names
    shared       the MLP of all tokens; shared_gate: its result times sigmoid(gate), one number a token
    shared_scale what its result is multiplied by
    reads_scaled name of a tensor [hidden_size] that what experts read, and not the router, is multiplied by; None: 1
    stacked      files hold one tensor for all experts, [count, ...], whose name lacks `{expert}.` and `.weight`,
    in_files     or is another: (the name so made, that in the files) each
    apart        of stacked ones, the names of linears that some files have instead of gate and up in one, each of
                 every expert; none: all files hold stacks
    weighs_input the weight of an expert multiplies what it reads, not its result
    within       the module of transformers that has them where files have each apart
    """

    router: Router
    count: int
    expert: MLP
    shared: MLP | None = None
    shared_gate: Linear | None = None
    stacked: bool = False
    in_files: tuple[tuple[str, str], ...] = ()
    weighs_input: bool = False
    apart: tuple[str, ...] = ()
    shared_scale: float = 1.0
    reads_scaled: str | None = None
    within: str = "mlp.experts"

    def at(self, index: int) -> MLP:
        """Return the MLP of one expert."""

        def named(made: Projection) -> Any:
            linear = made.linear if isinstance(made, Fused) else made
            linear = replace(linear, name=linear.name.format(expert=index))
            return replace(made, linear=linear) if isinstance(made, Fused) else linear

        mlp = self.expert
        gate = None if mlp.gate is None else named(mlp.gate)
        return replace(mlp, gate=gate, up=named(mlp.up), down=named(mlp.down))

    def stacks(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the name of each tensor of all experts in the file, and our names of its parts, one an expert."""
        if not self.stacked:
            return
        for linear in self.expert.linears:
            stem = linear.name.replace("{expert}.", "")
            for end, ours in (("", "weight"), *((("_bias", "bias"),) if linear.bias else ())):
                name = dict(self.in_files).get(f"{stem}{end}", f"{stem}{end}")
                yield name, tuple(f"{linear.name.format(expert=i)}.{ours}" for i in range(self.count))

    @property
    def linears(self) -> tuple[Linear, ...]:
        of_experts = (linear for index in range(self.count) for linear in self.at(index).linears)
        shared = () if self.shared is None else self.shared.linears
        gate = () if self.shared_gate is None else (self.shared_gate,)
        return (self.router.linear, *of_experts, *shared, *gate)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return ()

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of what is neither linear nor norm."""
        router, size = self.router, self.router.linear.in_features
        if router.correction is not None:
            yield router.correction, (1, self.count) if router.correction_row else (self.count,)
        scales = ((router.reads_scaled, size), (router.of_expert, self.count), (self.reads_scaled, size))
        yield from ((name, (length,)) for name, length in scales if name is not None)
