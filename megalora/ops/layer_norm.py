"""LayerNorm with frozen weights (Ba et al. 2016), as torch computes it, alone or with the residual sum before it.

`room` columns are left behind the result for whoever reads it, undefined there (see megalora.ops.lora_linear).
"""

from __future__ import annotations

import torch

from megalora.ops import fused_norm
from megalora.ops.fused_norm import NormWeights


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    room: int = 0,
    offset: bool = False,
) -> torch.Tensor:
    """Return weight * (x - mean) / sqrt(variance + eps) + bias over the last dimension, with room behind it.

    x [..., D]; weight, bias [D], frozen: they get no gradient; None: none. offset: the weight is 1 + w, in x's dtype.
    Returns [..., D + room].
    """
    norm = layer_weights(weight, bias, eps, offset)
    if fused_norm.takes(x, norm, room):
        return fused_norm.fused_norm(x, norm, room)
    return _LayerNorm.apply(x, weight, bias, eps, room, offset)


def layer_weights(
    weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, offset: bool = False
) -> NormWeights:
    """Return them as the kernels of a GPU take them."""
    return NormWeights("layer_offset" if offset else "layer", weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    room: int = 0,
    offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x + delta [N, D], layer_norm(x + delta) [N, D + room]) of x, delta [N, D]: on a GPU in one pass."""
    norm = layer_weights(weight, bias, eps, offset)
    if fused_norm.takes(x, norm, room):
        return fused_norm.add_fused_norm(x, delta, norm, room)
    total = x + delta
    return total, layer_norm(total, weight, bias, eps, room, offset)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, room, offset):
        used = 1 + weight if offset else weight
        normed, mean, inverse = torch.ops.aten.native_layer_norm(x, x.shape[-1:], used, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.offset = offset
        if not room:
            return normed
        y = x.new_empty(*x.shape[:-1], x.shape[-1] + room)
        y[..., : x.shape[-1]].copy_(normed)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        used = 1 + weight if ctx.offset else weight
        dy = dy[..., : x.shape[-1]].contiguous()
        backward = torch.ops.aten.native_layer_norm_backward
        dx = backward(dy, x, x.shape[-1:], mean, inverse, used, bias, [True, False, False])[0]
        return dx, None, None, None, None, None
