"""x * sigmoid(gate), which keeps its two inputs alone."""

from __future__ import annotations

import torch


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return x * sigmoid(gate) of one shape and dtype, computed in float32 or float64."""
    return _Gated.apply(x, gate)


def _opened(gate: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x, gate)
        return (x * _opened(gate)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        opened = _opened(gate)
        dx = grad * opened
        return dx.to(x.dtype), (dx * x * (1 - opened)).to(gate.dtype)
