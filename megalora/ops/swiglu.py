"""act(gate) * up of gated MLPs, SwiGLU and GeGLU (Shazeer 2020), and act(up) of plain ones, keeping their inputs only.

The activation is one of ACTS, by the name under which the compiled ops know it: all of them on a GPU, on a CPU silu of
a gate. Its result is rounded before up multiplies it, as in HF.

gate_up is [T, 2 I], gate before up; where there is no gate it is up [T, I].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from megalora.ops import extension, limits
from megalora.ops.dropout import Dropout
from megalora.ops.lora_linear import kernels_take, lora_down_, lora_down_input_grad_, mask_arguments


class _Act(NamedTuple):
    """value(gate), and backward(d, gate, grad_input=...) = d act'(gate)."""

    value: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[..., torch.Tensor]


_silu_backward, _gelu_backward = torch.ops.aten.silu_backward.grad_input, torch.ops.aten.gelu_backward.grad_input


class Made(NamedTuple):
    """What the linear down reads: act(gate) * up, or act(up) where it is not `gated`. act: one of ACTS."""

    act: str = "silu"
    gated: bool = True

    def width(self, size: int) -> int:
        """Return the features of gate_up that so many features are made of."""
        return size * (1 + self.gated)

    def value(self, gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return it of gate_up, in plain torch; in `out`, where it is given."""
        if self.gated:
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.mul(ACTS[self.act].value(gate), up, out=out)
        made = ACTS[self.act].value(gate_up)
        return made if out is None else out.copy_(made)


ACTS = {
    "silu": _Act(functional.silu, _silu_backward),
    "gelu_tanh": _Act(
        functools.partial(functional.gelu, approximate="tanh"), functools.partial(_gelu_backward, approximate="tanh")
    ),
    "gelu": _Act(functional.gelu, _gelu_backward),
}


def swiglu(gate_up: torch.Tensor, room: int = 0, act: str = "silu", gated: bool = True) -> torch.Tensor:
    """Map gate_up to act(gate) * up, or act(up) if not `gated`, [T, I + room], undefined in the room (see lora_linear).
    """
    return _SwiGlu.apply(gate_up, room, Made(act, gated))


def swiglu_down(
    gate_up: torch.Tensor,
    room: int,
    A_RI: torch.Tensor,
    token_index: torch.Tensor,
    draw: Dropout | None,
    act: str = "silu",
) -> torch.Tensor:
    """Map gate_up to [x | z | 0] [T, I + room]: x = act(gate) * up, or act(up), with z = dropout(x) A^T behind it.

    A [R, I] with R <= room, token_index [T] and draw as in lora_down_. Not for autograd.
    """
    rank, size = A_RI.shape
    made = Made(act, gate_up.shape[1] > size)
    if (
        fuses_down(gate_up.device.type, rank)
        and kernels_take(gate_up[:, :size], rank, draw)
        and _compiled(gate_up, room, made)
    ):
        X = gate_up.new_empty(gate_up.shape[0], size + room)
        arguments = (token_index, *mask_arguments(draw))
        torch.ops.megalora.swiglu_lora_down_(X[:, size:], gate_up, A_RI, *arguments, X[:, :size], act)
        return X
    X = swiglu(gate_up, room, *made)
    lora_down_(X, A_RI, token_index, draw)
    return X


def fuses_down(device_type: str, rank: int) -> bool:
    """Return whether swiglu_down reads no x there."""
    return device_type == "cuda" and rank <= limits.LARGEST_RANK_GATED_DOWN


def _compiled(gate_up: torch.Tensor, room: int, made: Made) -> bool:
    """Return whether kernels take it: on a CPU silu of a gate, not in float16; on a GPU not in float64, rows on 16
    bytes.
    """
    if not (extension.has_kernels(gate_up.device.type) and gate_up.is_contiguous()):
        return False
    if gate_up.device.type == "cpu":
        return made == ("silu", True) and gate_up.dtype != torch.float16
    octets = gate_up.shape[1] % made.width(limits.OCTET) == room % limits.OCTET == 0
    return gate_up.dtype != torch.float64 and octets


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, room, made):
        size = gate_up.shape[1] // made.width(1)
        ctx.save_for_backward(gate_up)
        ctx.size, ctx.act = size, made.act
        out = gate_up.new_empty(gate_up.shape[0], size + room)
        if _compiled(gate_up, room, made):
            torch.ops.megalora.swiglu_(gate_up, out[:, :size], made.act)
        else:
            made.value(gate_up, out[:, :size])
        return out

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        return _backward(dy[:, : ctx.size], gate_up, ctx.act), None, None


def _backward(dy: torch.Tensor, gate_up: torch.Tensor, act: str, again: torch.Tensor | None = None) -> torch.Tensor:
    """Return the gradient of gate_up; write the output into `again` [T, I], where given."""
    made = Made(act, gate_up.shape[1] > dy.shape[1])
    grad = torch.empty_like(gate_up)
    if _compiled(gate_up, 0, made) and dy.stride(1) == 1:
        torch.ops.megalora.swiglu_backward_(dy, gate_up, grad, act)
        if again is not None:
            torch.ops.megalora.swiglu_(gate_up, again, act)
        return grad
    if not made.gated:
        if again is not None:
            made.value(gate_up, again)
        return ACTS[act].backward(dy, gate_up, grad_input=grad)
    gate, up = gate_up.chunk(2, dim=-1)
    dgate, dup = grad.chunk(2, dim=-1)
    value = ACTS[act].value(gate)
    torch.mul(value, dy, out=dup)
    if again is not None:
        torch.mul(value, up, out=again)
    ACTS[act].backward(dy * up, gate, grad_input=dgate)
    return grad


Branch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Dropout | None]


def swiglu_backward(
    dy: torch.Tensor, gate_up: torch.Tensor, branch: Branch | None, act: str = "silu"
) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """Return (the gradient of gate_up, the output again [T, I], None), or with the output as the branch reads it: (the
    same, x, s) where s x is the dropped output.

    dy      [T, I], the gradient of the output, without the term of the LoRA branch that reads it; overwritten
    branch  (dz [T, R], A [R, I], token_index [T], dropout or None) of that term, mask . (dz A); None: there is none,
            and no output either
    One pass over memory on a GPU where there is a gate: the term is neither written nor read, and the mask is drawn
    once.
    """
    if branch is None:
        return _backward(dy, gate_up, act), None, None
    dz, A, token_index, draw = branch
    gated = gate_up.shape[1] > dy.shape[1]
    x = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    on_gpu = gated and dy.device.type == "cuda" and _compiled(gate_up, 0, Made(act))
    if on_gpu and kernels_take(dy, dz.shape[1], draw):
        grad = torch.empty_like(gate_up)
        arguments = (token_index, *mask_arguments(draw))
        torch.ops.megalora.swiglu_lora_backward_(dy, gate_up, dz, A, *arguments, grad, x, act)
        return grad, x, 1.0 if draw is None else draw.scale
    lora_down_input_grad_(dy, dz, A, token_index, draw)
    return _backward(dy, gate_up, act, x), x, None
