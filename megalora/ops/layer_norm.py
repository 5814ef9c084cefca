"""LayerNorm with frozen weights (Ba et al. 2016), as torch computes it, alone or with the residual sum before it.

`room` columns are left behind the result for whoever reads it, undefined there (see megalora.ops.lora_linear).
"""

from __future__ import annotations

import torch


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, room: int = 0
) -> torch.Tensor:
    """Return weight * (x - mean) / sqrt(variance + eps) + bias over the last dimension, with room behind it.

    x [..., D]; weight, bias [D], frozen: they get no gradient. Returns [..., D + room].
    """
    return _LayerNorm.apply(x, weight, bias, eps, room)


def add_layer_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x + delta [N, D], layer_norm(x + delta) [N, D + room]) of x, delta [N, D]."""
    total = x + delta
    return total, layer_norm(total, weight, bias, eps, room)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, room):
        normed, mean, inverse = torch.ops.aten.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        if not room:
            return normed
        y = x.new_empty(*x.shape[:-1], x.shape[-1] + room)
        y[..., : x.shape[-1]].copy_(normed)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        dy = dy[..., : x.shape[-1]].contiguous()
        backward = torch.ops.aten.native_layer_norm_backward
        dx = backward(dy, x, weight.shape, mean, inverse, weight, bias, [True, False, False])[0]
        return dx, None, None, None, None
