"""SwiGLU: silu(gate) * up (Shazeer 2020), keeping its two inputs only."""

from __future__ import annotations

import torch

from megalora.ops import extension


def swiglu(gate_up: torch.Tensor, room: int = 0) -> torch.Tensor:
    """gate_up [T, 2 I], gate before up -> silu(gate) * up [T, I + room], undefined in the room (see lora_linear)."""
    return _SwiGlu.apply(gate_up, room)


def _compiled(gate_up: torch.Tensor, room: int) -> bool:
    """Whether kernels take it: on a CPU not in float16; on a GPU not in float64, rows on 16 bytes."""
    if not (extension.has_kernels(gate_up.device.type) and gate_up.is_contiguous()):
        return False
    if gate_up.device.type == "cpu":
        return gate_up.dtype != torch.float16
    return gate_up.dtype != torch.float64 and gate_up.shape[1] % 16 == room % 8 == 0


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, room):
        size = gate_up.shape[1] // 2
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(gate_up.shape[0], size + room)
        if _compiled(gate_up, room):
            torch.ops.megalora.swiglu_(gate_up, out[:, :size])
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), up, out=out[:, :size])
        return out

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        size = gate_up.shape[1] // 2
        room = dy.shape[1] - size
        dy, grad = dy[:, :size], torch.empty_like(gate_up)
        if _compiled(gate_up, room) and dy.stride(1) == 1:
            torch.ops.megalora.swiglu_backward_(dy, gate_up, grad)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            dgate, dup = grad.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), dy, out=dup)
            torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return grad, None
