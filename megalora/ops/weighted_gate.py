"""SwiGLU of experts' rows, each times the weight of its pair: one Triton kernel on a GPU, torch elsewhere."""

from __future__ import annotations

import torch

from megalora.ops.routing import Routes, fuses
from megalora.ops.swiglu import swiglu, swiglu_backward

_BLOCK = 1024


def weighted_gate(gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, room: int) -> torch.Tensor:
    """Return w silu(gate) up with room behind it, [M, I + room], undefined in the room.

    gate_up [M, 2 I], gate before up; weights [F, k] in at least float32. Not for autograd.
    """
    if not fuses(gate_up):
        X = swiglu(gate_up, room)
        X[:, : gate_up.shape[1] // 2].mul_(weights.flatten()[routes.pair, None])
        return X
    from megalora.ops.routing_kernels import gate_kernel

    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    X = gate_up.new_empty(rows, size + room)
    grid = (rows, -(-size // _BLOCK))
    gate_kernel[grid](gate_up, weights.contiguous(), routes.pair, routes.count, X, size, X.stride(0), BLOCK=_BLOCK)
    return X


def weighted_gate_backward(
    dh: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the gradient of gate_up [M, 2 I], that of each row's weight [M]) from dh [M, I], which is overwritten."""
    if not fuses(gate_up):
        dweights = (dh * swiglu(gate_up)).sum(1, dtype=weights.dtype)
        return swiglu_backward(dh.mul_(weights.flatten()[routes.pair, None]), gate_up, None)[0], dweights
    from megalora.ops.routing_kernels import gate_backward_kernel

    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    grad, dweights = torch.empty_like(gate_up), weights.new_empty(rows)
    gate_backward_kernel[(rows,)](
        dh, gate_up, weights.contiguous(), routes.pair, routes.count, grad, dweights, size, dh.stride(0), BLOCK=_BLOCK
    )
    return grad, dweights
