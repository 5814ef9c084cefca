"""RMSNorm over features that are cut over the tensor-parallel ranks (olmo2's q and k): one number a token is summed."""

from __future__ import annotations

import torch

from megalora.ops.rms_norm import Rounding
from megalora.parallel.collectives import all_reduce
from megalora.parallel.mesh import Axis


def rms_norm_across(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    size: int,
    share: torch.Tensor,
    tp: Axis,
    rounding: Rounding,
) -> torch.Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), the mean taken over the features of all ranks.

    x [F, n] with this rank's features of `size` in all; weight [n], frozen: it gets no gradient
    share  [n] in at least float32: 1 over how many ranks hold the feature, 1 where no other does
    Where several ranks hold a feature, the gradient of x is this rank's term, as that of y is. Returns [F, n].
    """
    return _RmsNormAcross.apply(x, weight, eps, size, share, tp, rounding)


class _RmsNormAcross(torch.autograd.Function):
    """Forward and backward all-reduce one number a token. With n = x r, dn = dy w: dx = r (dn - share n mean(dn n))."""

    @staticmethod
    def forward(ctx, x, weight, eps, size, share, tp, rounding):
        precise = x.to(share.dtype)
        squares = all_reduce((precise.square() * share).sum(-1, keepdim=True), tp)
        inverse = squares.div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.size, ctx.tp, ctx.rounding, ctx.share = size, tp, rounding, share  # share is never written to
        normed, weight = precise * inverse, rounding.weight(weight)
        return (normed * weight).to(x.dtype) if rounding.precise else normed.to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        share = ctx.share
        normed = x.to(share.dtype) * inverse
        dn = (dy * ctx.rounding.weight(weight)).to(share.dtype)
        mean = all_reduce((dn * normed).sum(-1, keepdim=True), ctx.tp).div_(ctx.size)
        dx = (dn - normed * share * mean) * inverse
        return dx.to(x.dtype), None, None, None, None, None, None
