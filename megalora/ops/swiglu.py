"""SwiGLU: silu(gate) * up (Shazeer 2020), keeping its two inputs only."""

from __future__ import annotations

import torch

from megalora.ops import extension, limits
from megalora.ops.dropout import Dropout
from megalora.ops.lora_linear import kernels_take, lora_down_, lora_down_input_grad_, mask_arguments


def swiglu(gate_up: torch.Tensor, room: int = 0) -> torch.Tensor:
    """Map gate_up [T, 2 I], gate before up to silu(gate) * up [T, I + room], undefined in the room (see lora_linear).
    """
    return _SwiGlu.apply(gate_up, room)


def swiglu_down(
    gate_up: torch.Tensor, room: int, A_RI: torch.Tensor, token_index: torch.Tensor, draw: Dropout | None
) -> torch.Tensor:
    """Map gate_up [T, 2 I] to [x | z | 0] [T, I + room]: x = silu(gate) * up with z = dropout(x) A^T behind it.

    A [R, I] with R <= room, token_index [T] and draw as in lora_down_. Not for autograd.
    """
    rank, size = A_RI.shape
    if (
        fuses_down(gate_up.device.type, rank)
        and kernels_take(gate_up[:, :size], rank, draw)
        and _compiled(gate_up, room)
    ):
        X = gate_up.new_empty(gate_up.shape[0], size + room)
        arguments = (token_index, *mask_arguments(draw))
        torch.ops.megalora.swiglu_lora_down_(X[:, size:], gate_up, A_RI, *arguments, X[:, :size])
        return X
    X = swiglu(gate_up, room)
    lora_down_(X, A_RI, token_index, draw)
    return X


def fuses_down(device_type: str, rank: int) -> bool:
    """Return whether swiglu_down reads no x there."""
    return device_type == "cuda" and rank <= limits.LARGEST_RANK_GATED_DOWN


def _compiled(gate_up: torch.Tensor, room: int) -> bool:
    """Return whether kernels take it: on a CPU not in float16; on a GPU not in float64, rows on 16 bytes."""
    if not (extension.has_kernels(gate_up.device.type) and gate_up.is_contiguous()):
        return False
    if gate_up.device.type == "cpu":
        return gate_up.dtype != torch.float16
    return gate_up.dtype != torch.float64 and gate_up.shape[1] % (2 * limits.OCTET) == room % limits.OCTET == 0


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
        return _backward(dy[:, : gate_up.shape[1] // 2], gate_up), None


def _backward(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    grad = torch.empty_like(gate_up)
    if _compiled(gate_up, 0) and dy.stride(1) == 1:
        torch.ops.megalora.swiglu_backward_(dy, gate_up, grad)
        return grad
    gate, up = gate_up.chunk(2, dim=-1)
    dgate, dup = grad.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), dy, out=dup)
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    return grad


Branch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Dropout | None]


def swiglu_backward(
    dy: torch.Tensor, gate_up: torch.Tensor, branch: Branch | None
) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """Return (the gradient of gate_up [T, 2 I], the output again [T, I], None), or with the output as the branch reads
    it: (the same, x, s) where s x is the dropped output.

    dy      [T, I], the gradient of the output, without the term of the LoRA branch that reads it; overwritten
    branch  (dz [T, R], A [R, I], token_index [T], dropout or None) of that term, mask . (dz A); None: there is none,
            and no output either
    One pass over memory on a GPU: the term is neither written nor read, and the mask is drawn once.
    """
    if branch is None:
        return _backward(dy, gate_up), None, None
    dz, A, token_index, draw = branch
    if dy.device.type == "cuda" and kernels_take(dy, dz.shape[1], draw) and _compiled(gate_up, 0):
        grad, x = torch.empty_like(gate_up), torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        torch.ops.megalora.swiglu_lora_backward_(dy, gate_up, dz, A, token_index, *mask_arguments(draw), grad, x)
        return grad, x, 1.0 if draw is None else draw.scale
    lora_down_input_grad_(dy, dz, A, token_index, draw)
    return _backward(dy, gate_up), swiglu(gate_up), None
