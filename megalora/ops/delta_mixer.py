"""What stands between the linears of linear attention by the gated delta rule (Qwen3-Next): convolution, gates, the
rule and the gated norm.

    q, k, v <- silu(convolution(q, k, v));  beta = sigmoid(b);  g = -exp(A) softplus(a + bias)
    o = delta_rule(q, k, v, g, beta);  result = RMSNorm(o) * silu(z)

All is computed in float32 or float64, and rounded where q, k and v go into the rule and at the end. Training keeps what
it reads alone, and computes the rest again in backward, so many heads at a time that what this makes stays small. On
GPUs kernels do the same in bfloat16, with states and sums in float32 (megalora.ops.fused_delta).

Legend: F tokens, J key heads, each of which R value heads read, H = J R, K and V features of a key and a value; C =
2 J K + H V channels of q, k and v; W tokens of the convolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import silu, softplus

from megalora.ops import fused_delta
from megalora.ops.delta_rule import EPSILON, Documents, continued_delta_rule, delta_rule, delta_step
from megalora.ops.extension import has_triton
from megalora.ops.gated_norm import gated_norm
from megalora.ops.short_convolution import behind_kept, short_convolution

MOST_ROWS = 1 << 18  # tokens times value heads at once
MOST_FEATURES = 256  # of a key or a value, in the kernels of a step


class Heads(NamedTuple):
    """J key heads of K features, R value heads of V features each."""

    groups: int
    repeats: int
    key: int
    value: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of q, k, v, z, b and a, which lie side by side."""
        key, heads = self.groups * self.key, self.groups * self.repeats
        return (key, key, heads * self.value, heads * self.value, heads, heads)

    @property
    def channels(self) -> int:
        """C."""
        return sum(self.widths[:3])


@dataclass(frozen=True)
class DeltaWeights:
    """Frozen weights: convolution [C, W]; decay, the A above, and bias [H] float32 or float64; norm [V], its eps."""

    convolution: torch.Tensor
    decay: torch.Tensor
    bias: torch.Tensor
    norm: torch.Tensor
    eps: float


def delta_mixer(y: torch.Tensor, heads: Heads, weights: DeltaWeights, documents: Documents) -> torch.Tensor:
    """Return the results [F, H V] of y [F, 2 J K + 2 H V + 2 H], which is [q | k | v | z | b | a], in its dtype."""
    if fused_delta.fuses(y, heads.key, heads.value):
        return fused_delta.fused_delta_mixer(y, heads, weights, documents)
    return _Mixer.apply(y, heads, weights, documents)


class Kept(NamedTuple):
    """What earlier tokens of sequences leave: channels [B, W - 1, C] of the last ones, states [B, H, K, V] of float32
    or float64."""

    channels: torch.Tensor
    states: torch.Tensor

    @classmethod
    def nothing(cls, count: int, heads: Heads, weights: DeltaWeights, like: torch.Tensor) -> Kept:
        """Return that of `count` sequences without tokens; like: y."""
        channels, width = weights.convolution.shape
        states = (count, heads.groups * heads.repeats, heads.key, heads.value)
        return cls(like.new_zeros(count, width - 1, channels), like.new_zeros(states, dtype=weights.decay.dtype))


def continued_delta_mixer(
    y: torch.Tensor, heads: Heads, weights: DeltaWeights, bounds: Sequence[int], documents: Documents, kept: Kept
) -> tuple[torch.Tensor, Kept]:
    """Return (results as `delta_mixer`, what is kept behind them) of the next tokens of several sequences.

    bounds  cumulative bounds of the sequences in F; documents: of these
    """
    qkv, z, b, a = y.split([heads.channels, *heads.widths[3:]], -1)
    (whole, channels), before = behind_kept(kept.channels, qkv, bounds), kept.channels.shape[1]
    made = [short_convolution(one, weights.convolution, None)[before:] for one in whole]
    given = _of_rule(torch.cat(made), b, a, heads, weights)
    o, states = continued_delta_rule(*given, documents, kept.states)
    return gated_norm(o, z, weights.norm, weights.eps), Kept(channels, states)


def delta_mixer_step(
    y: torch.Tensor, heads: Heads, weights: DeltaWeights, kept: Kept, slots: torch.Tensor, idle: int | None = None
) -> torch.Tensor:
    """Return the results of one token of each of B sequences, y [B, ...], and bring what their slots keep forward, in
    place.

    kept   of all slots
    slots  [B] int64, the slot of each sequence; none twice, but for `idle`
    idle   a slot of no sequence: rows that fill a step up name it, and neither their results nor what it keeps count
    """
    if takes_step(y.device.type, y.dtype, heads, weights):
        from megalora.ops.fused_delta_step import fused_delta_step

        own = weights.convolution, weights.decay, weights.bias, weights.norm
        return fused_delta_step(y, heads, own, kept, slots, idle, weights.eps, EPSILON)
    qkv, z, b, a = y.split([heads.channels, *heads.widths[3:]], -1)
    seen = torch.cat([kept.channels[slots], qkv.unsqueeze(1)], 1)
    wide = weights.decay.dtype
    made = silu((seen.to(wide) * weights.convolution.t().to(wide)).sum(1)).to(y.dtype)
    o, kept.states[slots] = delta_step(*_of_rule(made, b, a, heads, weights), kept.states[slots])
    kept.channels[slots] = seen[:, 1:]
    return gated_norm(o, z, weights.norm, weights.eps)


def takes_step(device_type: str, dtype: torch.dtype, heads: Heads, weights: DeltaWeights) -> bool:
    """Return whether kernels take `delta_mixer_step` of y of this dtype: on a GPU, states in float32."""
    fits = max(heads.key, heads.value) <= MOST_FEATURES and weights.decay.dtype == torch.float32
    return device_type == "cuda" and dtype != torch.float64 and fits and has_triton()


class _Given(NamedTuple):
    """What `delta_rule` reads."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor


def _of_rule(qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, heads: Heads, weights: DeltaWeights) -> _Given:
    """Return what `delta_rule` reads, of channels [F, C] behind convolution and activation."""
    q, k, v = (x.unflatten(-1, (-1, size)) for x, size in zip(
        qkv.split(heads.widths[:3], -1), (heads.key, heads.key, heads.value), strict=True
    ))  # fmt: skip
    wide = weights.decay.dtype
    g = -weights.decay.exp() * softplus(a.to(wide) + weights.bias)
    return _Given(q, k, v, g, torch.sigmoid(b.to(wide)))


def _mixed(parts: Sequence[torch.Tensor], heads: Heads, weights: DeltaWeights, documents: Documents) -> torch.Tensor:
    """Return the result of [q | k | v], z, b and a."""
    qkv, z, b, a = parts
    ages = documents.ages if len(documents.order) > 1 else None
    made = short_convolution(qkv, weights.convolution, ages)
    o = delta_rule(*_of_rule(made, b, a, heads, weights), documents)
    return gated_norm(o, z, weights.norm, weights.eps)


class _Slice(NamedTuple):
    """Some of the key heads, with the value heads that read them.

    columns  of each of q, k, v, z, b and a
    result   columns of the result
    """

    heads: Heads
    weights: DeltaWeights
    columns: list[slice]
    result: slice

    def parts(self, y: torch.Tensor) -> list[torch.Tensor]:
        """Return [q | k | v], z, b and a."""
        q, k, v, *others = (y[:, columns] for columns in self.columns)
        whole = self.columns[0].stop == self.columns[1].start and self.columns[1].stop == self.columns[2].start
        channels = y[:, self.columns[0].start : self.columns[2].stop] if whole else torch.cat([q, k, v], 1)
        return [channels, *others]

    def put(self, y: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Write parts as `parts` gives them to their places."""
        found = (*parts[0].split(self.heads.widths[:3], -1), *parts[1:])
        for columns, one in zip(self.columns, found, strict=True):
            y[:, columns] = one


def _slices(tokens: int, heads: Heads, weights: DeltaWeights) -> list[_Slice]:
    most = max(1, MOST_ROWS // max(1, tokens * heads.repeats))
    count = -(-heads.groups // most)
    edges = [heads.groups * i // count for i in range(count + 1)]
    each = [width // heads.groups for width in heads.widths]
    starts = list(itertools.accumulate(heads.widths, initial=0))[:-1]
    found = []
    for first, stop in itertools.pairwise(edges):
        columns = [slice(at + first * n, at + stop * n) for at, n in zip(starts, each, strict=True)]
        own = weights
        if count > 1:
            channels = torch.cat([weights.convolution[columns[i]] for i in range(3)])
            values = slice(first * heads.repeats, stop * heads.repeats)
            own = DeltaWeights(channels, weights.decay[values], weights.bias[values], weights.norm, weights.eps)
        result = slice(first * each[2], stop * each[2])
        found.append(_Slice(heads._replace(groups=stop - first), own, columns, result))
    return found


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, heads, weights, documents):
        slices = _slices(len(y), heads, weights)
        ctx.save_for_backward(y)
        ctx.slices, ctx.documents = slices, documents
        if len(slices) == 1:
            return _mixed(slices[0].parts(y), heads, weights, documents)
        out = y.new_empty(len(y), heads.widths[2])
        for one in slices:
            out[:, one.result] = _mixed(one.parts(y), one.heads, one.weights, documents)
        return out

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)
        for one in ctx.slices:
            parts = [part.detach().requires_grad_() for part in one.parts(y)]
            with torch.enable_grad():
                out = _mixed(parts, one.heads, one.weights, ctx.documents)
            one.put(dy, torch.autograd.grad(out, parts, grad[:, one.result]))
        return dy, None, None, None
