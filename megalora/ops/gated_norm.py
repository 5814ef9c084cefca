"""RMSNorm of each head times SiLU of a gate, which keeps its inputs alone (Qwen3-Next)."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) * silu(gate) [F, H V], in the dtype of the gate.

    x       [F, H, V] float32 or float64, in which it is computed
    gate    [F, H V]
    weight  [V], which gets no gradient
    """
    return _GatedNorm.apply(x, gate, weight, eps)


def _inverse(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) [F, H, 1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(length * length / x.shape[-1] + eps)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps):
        ctx.eps = eps
        ctx.save_for_backward(x, gate, weight)
        normed = (x * _inverse(x, eps)).mul_(weight.to(x.dtype))
        opened = silu(gate.to(x.dtype, copy=True), inplace=True)
        return normed.flatten(1).mul_(opened).to(gate.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, gate, weight = ctx.saved_tensors
        inverse, weight = _inverse(x, ctx.eps), weight.to(x.dtype)
        wide = gate.to(x.dtype)
        sigmoid = torch.sigmoid(wide)
        normed, grad = x * inverse, grad.to(x.dtype)
        slope = (1 - sigmoid).mul_(wide).add_(1).mul_(sigmoid)
        d_gate = slope.mul_(grad).mul_((normed * weight).flatten(1))
        d_normed = (sigmoid.mul_(wide).mul_(grad)).view_as(x).mul_(weight)
        mean = (d_normed * normed).mean(-1, keepdim=True)
        return d_normed.sub_(normed.mul_(mean)).mul_(inverse), d_gate.to(gate.dtype), None, None
