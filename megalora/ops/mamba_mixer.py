"""What stands between the linears of Mamba-2 (Dao and Gu 2024): convolution, time steps, the state space and the gated
norm.

    x, b, c <- silu(convolution(x, b, c));  t = softplus(step_scale dt + bias);  g = -exp(A) t
    o = state_space(t x, b, c, g) + D x;  o <- o * silu(gate_scale z);  result = norm * o / rms(o in its group)

All is computed in float32 or float64, and rounded behind the convolution and at the end. Training keeps what it reads,
and of a norm its result and one number a group; the rest is computed again in backward, so many heads at a time that
what this makes stays small.

Legend: F tokens, H heads of P features, J groups, each of which has b and c of N features for R heads, H = J R; C =
H P + 2 J N channels of x, b and c; W tokens of the convolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.functional import silu, softplus

from megalora.ops.delta_rule import Documents
from megalora.ops.short_convolution import behind_kept, short_convolution
from megalora.ops.state_space import continued_state_space, state_space, state_space_step

MOST_ROWS = 1 << 18  # tokens times heads at once
Sums = Callable[[torch.Tensor], torch.Tensor]
"""Sums [F, J] over all ranks that hold heads of a group."""


class Sizes(NamedTuple):
    """H heads of P features; J groups of N."""

    heads: int
    groups: int
    features: int
    state: int

    @property
    def repeats(self) -> int:
        """R."""
        return self.heads // self.groups

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of z, x, b, c and dt, which lie side by side."""
        inner, states = self.heads * self.features, self.groups * self.state
        return (inner, inner, states, states, self.heads)

    @property
    def channels(self) -> int:
        """C."""
        return sum(self.widths[1:4])


@dataclass(frozen=True)
class MambaWeights:
    """Frozen weights: convolution [C, W], its bias [C] or None; decay, the A above, bias and skip, the D above, [H]
    float32 or float64; norm [H P], its eps and `across`, features of a whole group, those of other ranks too; None:
    there is no norm. gate_scale, step_scale: as above.
    """

    convolution: torch.Tensor
    convolution_bias: torch.Tensor | None
    decay: torch.Tensor
    bias: torch.Tensor
    skip: torch.Tensor
    norm: torch.Tensor | None
    eps: float
    across: int
    gate_scale: float = 1.0
    step_scale: float = 1.0


def mamba_mixer(
    y: torch.Tensor, sizes: Sizes, weights: MambaWeights, documents: Documents, sums: Sums | None = None
) -> torch.Tensor:
    """Return the results [F, H P] of y [F, 2 H P + 2 J N + H], which is [z | x | b | c | dt], in its dtype.

    sums  None: this rank has all heads of its groups
    """
    return _Mixer.apply(y, sizes, weights, documents, sums)


class Kept(NamedTuple):
    """What earlier tokens of sequences leave: channels [B, W - 1, C] of the last ones, states [B, J, N, R, P] of
    float32 or float64."""

    channels: torch.Tensor
    states: torch.Tensor

    @classmethod
    def nothing(cls, count: int, sizes: Sizes, weights: MambaWeights, like: torch.Tensor) -> Kept:
        """Return that of `count` sequences without tokens; like: y."""
        channels, width = weights.convolution.shape
        states = (count, sizes.groups, sizes.state, sizes.repeats, sizes.features)
        return cls(like.new_zeros(count, width - 1, channels), like.new_zeros(states, dtype=weights.decay.dtype))


def continued_mamba_mixer(
    y: torch.Tensor,
    sizes: Sizes,
    weights: MambaWeights,
    bounds: Sequence[int],
    documents: Documents,
    kept: Kept,
    sums: Sums | None = None,
) -> tuple[torch.Tensor, Kept]:
    """Return (results as `mamba_mixer`, what is kept behind them) of the next tokens of several sequences.

    bounds  cumulative bounds of the sequences in F; documents: of these
    """
    z, xbc, dt = _in_three(y, sizes)
    (whole, channels), before = behind_kept(kept.channels, xbc, bounds), kept.channels.shape[1]
    states = torch.empty_like(kept.states)
    gated = z.new_empty(len(z), sizes.widths[0], dtype=weights.decay.dtype)
    for one in _slices(len(y), sizes, weights):
        own = [one.of_channels(x, sizes.widths[0]) for x in whole]
        bias = one.weights.convolution_bias
        made = torch.cat([short_convolution(x, one.weights.convolution, None, bias)[before:] for x in own])
        given = _given(made, dt[:, one.heads], one.sizes, one.weights)
        held = kept.states[:, one.groups, :, one.repeats]
        o, states[:, one.groups, :, one.repeats] = continued_state_space(*given.rule, documents, held)
        gated[:, one.inner] = _gated(o, given, z[:, one.inner], one.weights)
    return _normed(gated, sizes, weights, sums, y.dtype)[0], Kept(channels, states)


def mamba_mixer_step(
    y: torch.Tensor, sizes: Sizes, weights: MambaWeights, kept: Kept, slots: torch.Tensor, sums: Sums | None = None
) -> torch.Tensor:
    """Return the results of one token of each of B sequences, y [B, ...], and bring what their slots keep forward, in
    place.

    kept  of all slots; slots: [B] int64, the slot of each sequence, none twice but for one of no sequence
    """
    z, xbc, dt = _in_three(y, sizes)
    seen, wide = torch.cat([kept.channels[slots], xbc.unsqueeze(1)], 1), weights.decay.dtype
    made = (seen.to(wide) * weights.convolution.t().to(wide)).sum(1)
    made = silu(made if weights.convolution_bias is None else made + weights.convolution_bias).to(y.dtype)
    given = _given(made, dt, sizes, weights)
    o, kept.states[slots] = state_space_step(*given.rule, kept.states[slots])
    kept.channels[slots] = seen[:, 1:]
    return _normed(_gated(o, given, z, weights), sizes, weights, sums, y.dtype)[0]


class _Given(NamedTuple):
    """rule: what `state_space` reads; x [F, H, P], which it does not."""

    rule: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    x: torch.Tensor


def _in_three(y: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """Return z, [x | b | c] and dt."""
    return y.split([sizes.widths[0], sizes.channels, sizes.heads], -1)


def _given(xbc: torch.Tensor, dt: torch.Tensor, sizes: Sizes, weights: MambaWeights) -> _Given:
    """Return what the rule reads, of channels [F, C] behind convolution and activation."""
    wide = weights.decay.dtype
    x, b, c = xbc.to(wide).split(sizes.widths[1:4], -1)
    x = x.unflatten(-1, (sizes.heads, sizes.features))
    b, c = (one.unflatten(-1, (sizes.groups, sizes.state)) for one in (b, c))
    steps = softplus(dt.to(wide) * weights.step_scale + weights.bias)
    return _Given((x * steps.unsqueeze(-1), b, c, -weights.decay.exp() * steps), x)


def _gated(o: torch.Tensor, given: _Given, z: torch.Tensor, weights: MambaWeights) -> torch.Tensor:
    """Return (o + D x) * silu(gate_scale z) [F, H P]."""
    o = o + given.x * weights.skip.unsqueeze(-1)
    return o.flatten(1) * silu(z.to(o.dtype) * weights.gate_scale)


def _normed(
    gated: torch.Tensor, sizes: Sizes, weights: MambaWeights, sums: Sums | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (the result in this dtype, 1 / rms of each group [F, J], or None where there is no norm)."""
    if weights.norm is None:
        return gated.to(dtype), None
    grouped = gated.unflatten(1, (sizes.groups, -1))
    squares = grouped.square().sum(-1)
    squares = squares if sums is None else sums(squares)
    inverse = (squares / weights.across + weights.eps).rsqrt()
    normed = (grouped * inverse.unsqueeze(-1)).flatten(1) * weights.norm.to(gated.dtype)
    return normed.to(dtype), inverse


@dataclass(frozen=True)
class _Slice:
    """Some heads: of one group, or all of several.

    groups, repeats  those among all, and of each of these groups
    columns          of z, x, b, c and dt in y
    """

    sizes: Sizes
    weights: MambaWeights
    groups: slice
    repeats: slice
    columns: tuple[slice, ...]

    @property
    def inner(self) -> slice:
        """Columns of z, and of the result."""
        return self.columns[0]

    @property
    def heads(self) -> slice:
        """Columns of dt where that is alone."""
        width = self.sizes.features
        return slice(self.inner.start // width, self.inner.stop // width)

    def of_channels(self, xbc: torch.Tensor, ahead: int) -> torch.Tensor:
        """Return these heads' columns of [x | b | c], which begins with column `ahead` of y."""
        x, b, c = (slice(one.start - ahead, one.stop - ahead) for one in self.columns[1:4])
        if x.stop == b.start and b.stop == c.start:
            return xbc[:, x.start : c.stop]
        return torch.cat([xbc[:, one] for one in (x, b, c)], 1)

    def parts(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return z, [x | b | c] and dt."""
        return y[:, self.columns[0]], self.of_channels(y, 0), y[:, self.columns[4]]

    def add(self, dy: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Add parts as `parts` gives them to their places: heads of several slices read the same b and c."""
        z, xbc, dt = parts
        for columns, one in zip(self.columns, (z, *xbc.split(self.sizes.widths[1:4], -1), dt), strict=True):
            dy[:, columns] += one


def _slices(tokens: int, sizes: Sizes, weights: MambaWeights) -> list[_Slice]:
    """Return the heads of y, so many at a time that tokens times heads are at most about MOST_ROWS."""
    most, repeats = max(1, MOST_ROWS // max(1, tokens)), sizes.repeats
    groups = _ranges(sizes.groups, max(1, most // repeats))
    found = []
    for group, part in itertools.product(groups, _ranges(repeats, most)):
        first = group.start * repeats + part.start
        heads = slice(first, first + (group.stop - group.start - 1) * repeats + part.stop - part.start)
        of_heads, of_groups = (heads, sizes.features), (group, sizes.state)
        starts = itertools.accumulate(sizes.widths, initial=0)
        kinds = (of_heads, of_heads, of_groups, of_groups, (heads, 1))
        columns = tuple(
            slice(at + one.start * size, at + one.stop * size) for at, (one, size) in zip(starts, kinds, strict=False)
        )
        own = sizes._replace(heads=heads.stop - heads.start, groups=group.stop - group.start)
        found.append(_Slice(own, weights, group, part, columns))
    if len(found) == 1:
        return found
    return [replace(one, weights=_weights_of(one, sizes, weights)) for one in found]


def _ranges(count: int, most: int) -> list[slice]:
    parts = -(-count // most)
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def _weights_of(one: _Slice, sizes: Sizes, weights: MambaWeights) -> MambaWeights:
    """Return the weights of the heads of a slice, without the norm."""
    bias, ahead = weights.convolution_bias, sizes.widths[0]
    return replace(
        weights,
        convolution=one.of_channels(weights.convolution.t(), ahead).t(),
        convolution_bias=None if bias is None else one.of_channels(bias.unsqueeze(0), ahead).squeeze(0),
        decay=weights.decay[one.heads],
        bias=weights.bias[one.heads],
        skip=weights.skip[one.heads],
        norm=None,
    )


def _mixed(parts: Sequence[torch.Tensor], one: _Slice, documents: Documents) -> torch.Tensor:
    """Return what the norm reads of these heads, of z, [x | b | c] and dt."""
    z, xbc, dt = parts
    ages = documents.ages if len(documents.order) > 1 else None
    made = short_convolution(xbc, one.weights.convolution, ages, one.weights.convolution_bias)
    given = _given(made, dt, one.sizes, one.weights)
    return _gated(state_space(*given.rule, documents), given, z, one.weights)


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, sizes, weights, documents, sums):
        slices = _slices(len(y), sizes, weights)
        if len(slices) == 1:
            gated = _mixed(slices[0].parts(y), slices[0], documents)
        else:
            gated = y.new_empty(len(y), sizes.widths[0], dtype=weights.decay.dtype)
            for one in slices:
                gated[:, one.inner] = _mixed(one.parts(y), one, documents)
        out, inverse = _normed(gated, sizes, weights, sums, y.dtype)
        ctx.save_for_backward(y, *(() if inverse is None else (out, inverse)))
        ctx.slices, ctx.documents, ctx.sizes, ctx.weights, ctx.sums = slices, documents, sizes, weights, sums
        return out

    @staticmethod
    def backward(ctx, grad):
        (y, *normed), weights, sizes = ctx.saved_tensors, ctx.weights, ctx.sizes
        wide, mean = weights.decay.dtype, None
        grad = grad.to(wide)
        if weights.norm is not None:  # of r = 1 / rms and n = gated r: d gated = r (dn - n mean(dn n)), dn n = grad out
            out, inverse = normed
            mean = (grad * out).unflatten(1, (sizes.groups, -1)).sum(-1)
            mean = (mean if ctx.sums is None else ctx.sums(mean)) / weights.across
            grad = grad * weights.norm.to(wide)
        dy = torch.zeros_like(y, memory_format=torch.contiguous_format)
        for one in ctx.slices:
            parts = [part.detach().requires_grad_() for part in one.parts(y)]
            with torch.enable_grad():
                gated = _mixed(parts, one, ctx.documents)
            d_gated = grad[:, one.inner]
            if mean is not None:
                r, of_groups = inverse[:, one.groups].unsqueeze(-1), (one.sizes.groups, -1)
                n = gated.detach().unflatten(1, of_groups) * r
                d_gated = (d_gated.unflatten(1, of_groups) - n * mean[:, one.groups].unsqueeze(-1)) * r
                d_gated = d_gated.flatten(1)
            one.add(dy, torch.autograd.grad(gated, parts, d_gated))
        return dy, None, None, None, None
