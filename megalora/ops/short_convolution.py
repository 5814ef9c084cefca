"""SiLU of a short causal convolution of each channel over the tokens of its document."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def short_convolution(x: torch.Tensor, weight: torch.Tensor, ages: torch.Tensor | None) -> torch.Tensor:
    """Return silu(y) [F, C]: y[t, c] = sum over j < K of weight[c, K - 1 - j] x[t - j, c], t - j in t's document.

    x       [F, C] of any float dtype, which the result has too; computed in float32 or float64
    weight  [C, K], which gets no gradient
    ages    [F] int, each token's place in its document; None: all tokens are of one document
    """
    return _Convolution.apply(x, weight, ages)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ages):
        taps = weight.to(torch.promote_types(x.dtype, torch.float32)).t().flip(0)  # [K, C]: the token's own first
        ctx.taps, ctx.ages = taps, ages
        ctx.save_for_backward(x)
        return silu(_convolved(x, taps, ages), inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,), taps, ages = ctx.saved_tensors, ctx.taps, ctx.ages
        y = _convolved(x, taps, ages)
        gate = torch.sigmoid(y)
        dy = y.mul_(1 - gate).add_(1).mul_(gate).mul_(grad)
        dx = dy * taps[0]
        # A token gives to those behind it in its document: those that are j from its start have nothing of j before.
        for j in range(1, min(len(taps), len(x))):
            dx[:-j].addcmul_(_reached(dy, ages, j)[j:], taps[j])
        return dx.to(x.dtype), None, None


def _convolved(x: torch.Tensor, taps: torch.Tensor, ages: torch.Tensor | None) -> torch.Tensor:
    """Return y: the farthest tokens first, so that one mask a step hides them and all that are farther."""
    y = x.new_zeros(x.shape, dtype=taps.dtype)
    for j in reversed(range(1, min(len(taps), len(x)))):
        y[j:].addcmul_(x[:-j], taps[j])
        y = _reached(y, ages, j)
    return y.addcmul_(x, taps[0])


def _reached(x: torch.Tensor, ages: torch.Tensor | None, j: int) -> torch.Tensor:
    """Return x [F, C] with zeros, in place, in the first j tokens of each document."""
    return x if ages is None else x.masked_fill_((ages < j).unsqueeze(1), 0.0)
