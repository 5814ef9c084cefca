"""A short causal convolution of each channel over the tokens of its document, with SiLU behind it or between gates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.nn.functional import silu


def short_convolution(
    x: torch.Tensor, weight: torch.Tensor, ages: torch.Tensor | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return silu(y) [F, C]: y[t, c] = bias[c] + sum over j < K of weight[c, K - 1 - j] x[t - j, c], t - j in t's
    document.

    x       [F, C] of any float dtype, which the result has too; computed in float32 or float64
    weight  [C, K], bias [C] or None: they get no gradient
    ages    [F] int, each token's place in its document; None: all tokens are of one document
    """
    return _Convolution.apply(x, weight, bias, ages)


def gated_convolution(
    y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ages: torch.Tensor | None
) -> torch.Tensor:
    """Return c * (the convolution of b * x) [F, C], of y [F, 3 C], which is [b | c | x] (LFM2).

    The others are as those of `short_convolution`, whose SiLU it lacks. Training keeps y alone.
    """
    return _GatedConvolution.apply(y, weight, bias, ages)


def behind_kept(kept: torch.Tensor, x: torch.Tensor, bounds: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return (the tokens of each sequence behind those kept of it, [W - 1 + n, C] each; what is kept then, as `kept`).

    kept [B, W - 1, C]: the last tokens before; x [F, C]: the next tokens; bounds: cumulative, of the sequences in F
    """
    parts = itertools.pairwise(bounds)
    whole = [torch.cat([old, x[start:stop]]) for old, (start, stop) in zip(kept, parts, strict=True)]
    return whole, torch.stack([one[len(one) - kept.shape[1] :] for one in whole])


def taps_of(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return weight [C, K] as [K, C], the token's own first, in float32 or float64 for x of this dtype."""
    return weight.to(torch.promote_types(dtype, torch.float32)).t().flip(0)


def convolved(
    x: torch.Tensor, taps: torch.Tensor, ages: torch.Tensor | None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return y [F, C] in the dtype of taps: the farthest tokens first, so that one mask a step hides them and all that
    are farther."""
    y = x.new_zeros(x.shape, dtype=taps.dtype)
    for j in reversed(range(1, min(len(taps), len(x)))):
        y[j:].addcmul_(x[:-j], taps[j])
        y = _reached(y, ages, j)
    y.addcmul_(x, taps[0])
    return y if bias is None else y.add_(bias)


def convolved_backward(dy: torch.Tensor, taps: torch.Tensor, ages: torch.Tensor | None) -> torch.Tensor:
    """Return the gradient of x from that of y [F, C], in the dtype of taps, which is overwritten."""
    dx = dy * taps[0]
    # A token gives to those behind it in its document: those that are j from its start have nothing of j before.
    for j in range(1, min(len(taps), len(dy))):
        dx[:-j].addcmul_(_reached(dy, ages, j)[j:], taps[j])
    return dx


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, ages):
        ctx.taps, ctx.ages, ctx.bias = taps_of(weight, x.dtype), ages, bias
        ctx.save_for_backward(x)
        return silu(convolved(x, ctx.taps, ages, bias), inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,), taps, ages = ctx.saved_tensors, ctx.taps, ctx.ages
        y = convolved(x, taps, ages, ctx.bias)
        gate = torch.sigmoid(y)
        dy = y.mul_(1 - gate).add_(1).mul_(gate).mul_(grad)
        return convolved_backward(dy, taps, ages).to(x.dtype), None, None, None


class _GatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, ages):
        ctx.taps, ctx.ages, ctx.bias = taps_of(weight, y.dtype), ages, bias
        ctx.save_for_backward(y)
        b, c, x = y.chunk(3, -1)
        return convolved(b.to(ctx.taps.dtype) * x, ctx.taps, ages, bias).mul_(c).to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        (y,), taps, ages = ctx.saved_tensors, ctx.taps, ctx.ages
        b, c, x = y.chunk(3, -1)
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)
        db, dc, dx = dy.chunk(3, -1)
        wide = b.to(taps.dtype)
        dc.copy_(convolved(wide * x, taps, ages, ctx.bias).mul_(grad))
        inner = convolved_backward(grad * c.to(taps.dtype), taps, ages)
        dx.copy_(wide * inner)
        db.copy_(inner.mul_(x))
        return dy, None, None, None


def _reached(x: torch.Tensor, ages: torch.Tensor | None, j: int) -> torch.Tensor:
    """Return x [F, C] with zeros, in place, in the first j tokens of each document."""
    return x if ages is None else x.masked_fill_((ages < j).unsqueeze(1), 0.0)
