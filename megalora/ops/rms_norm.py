"""RMSNorm with a frozen weight (Zhang and Sennrich 2019), as HF's LlamaRMSNorm computes it."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in at least float32.

    x [..., D]; weight [D], frozen: it gets no gradient. Only x and one number a row are kept for backward.
    """
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.linalg.vecdot(precise, precise).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (precise * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        # n = x r, dn = dy w:  dx = r (dn - n mean(dn n))
        normed = x.to(inverse.dtype) * inverse
        dn = (dy * weight).to(inverse.dtype)
        mean = torch.linalg.vecdot(dn, normed).div_(x.shape[-1]).unsqueeze(-1)
        return dn.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype), None, None
