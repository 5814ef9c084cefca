"""A short causal convolution of each channel over the tokens of its document."""

from __future__ import annotations

import torch


def short_convolution(x: torch.Tensor, weight: torch.Tensor, ages: torch.Tensor | None) -> torch.Tensor:
    """Return y [F, C]: y[t, c] = sum over j < K of weight[c, K - 1 - j] x[t - j, c], where t - j is in t's document.

    x       [F, C] of any float dtype
    weight  [C, K], which gets no gradient
    ages    [F] int, each token's place in its document; None: all tokens are of one document
    Returns y in float32, or float64 of such x.
    """
    return _Convolution.apply(x, weight, ages)


def _shifts(width: int, tokens: int) -> range:
    return range(1, min(width, tokens))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ages):
        wide = torch.promote_types(x.dtype, torch.float32)
        taps = weight.to(wide).t().flip(0)  # [K, C]: the token's own first
        ctx.ages, ctx.taps, ctx.dtype = ages, taps, x.dtype
        y = x * taps[0]
        for j in _shifts(len(taps), len(x)):
            y[j:].addcmul_(_seen(x[:-j].to(wide), ages, j), taps[j])
        return y

    @staticmethod
    def backward(ctx, dy):
        taps, ages = ctx.taps, ctx.ages
        dx = dy * taps[0]
        for j in _shifts(len(taps), len(dy)):
            dx[:-j].addcmul_(_seen(dy[j:], ages, j), taps[j])
        return dx.to(ctx.dtype), None, None


def _seen(x: torch.Tensor, ages: torch.Tensor | None, j: int) -> torch.Tensor:
    """Return what goes from each token to that j behind it, [F - j, C]: nothing into another document."""
    return x if ages is None else x * (ages[j:] >= j).unsqueeze(1)
