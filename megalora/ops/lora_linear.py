"""A linear with LoRA branches as two GEMMs of one matrix: the branch costs columns, not passes over memory.

The frozen weight and the scaled B lie side by side in one matrix P = [W | s B], and the input carries its
down-projection behind it, X = [x | z] with z = dropout(x) A^T. Then

    forward    y          = X P^T            = x W^T + s z B^T
    backward   [dx | dz]  = dy P             dz is that of the branch
               dA         = dz^T dropout(x)  the mask is drawn again, never stored
               dB         = s dy^T z
               dx        += mask . (dz A)

so that what is left of the branch is one read of x for z, one of dy for dB, one of x for dA, and the masked term of dx.
Linears that read one input (q k v; gate up) stand in one P, one below the other, each with its own columns for z.

Legend: T tokens, I in_features, R rank of all branches of the input together, C columns of room for z (R rounded up),
O out_features of all linears together.
"""

from __future__ import annotations

import torch

from megalora.ops import extension
from megalora.ops.dropout import Dropout, dropout, dropout_add_, op_arguments

# Columns come in multiples of this many. On a GPU, GEMMs on rows of an odd stride are up to a fifth slower.
_ROOM = {"cuda": 64}
_ROOM_ELSEWHERE = 8


def room_for(rank: int, device_type: str) -> int:
    """C, the columns behind an input whose branches have R = rank."""
    step = _ROOM.get(device_type, _ROOM_ELSEWHERE)
    return -(-rank // step) * step


def lora_down_(X_TIC: torch.Tensor, A_RI: torch.Tensor, token_index: torch.Tensor, draw: Dropout | None) -> None:
    """Writes z = dropout(x) A^T behind x, in place, and zeros into what is left of the room.

    X [T, I + C]; A [R, I] in x's dtype; token_index [T] int64; draw None means no dropout.
    """
    rank, columns = A_RI.shape
    x = X_TIC[:, :columns]
    if _compiled(x, rank, draw):
        torch.ops.megalora.lora_down_(X_TIC[:, columns:], x, A_RI, token_index, *_mask(draw))
        return
    dropped = x if draw is None else dropout(x, token_index, draw)
    torch.mm(dropped, A_RI.t(), out=X_TIC[:, columns : columns + rank])
    X_TIC[:, columns + rank :].zero_()


def lora_down_weight_grad(
    dz_TR: torch.Tensor, x_TI: torch.Tensor, token_index: torch.Tensor, draw: Dropout | None
) -> torch.Tensor:
    """dA [R, I] = dz^T dropout(x), with the mask drawn again; in x's dtype or float32."""
    if _compiled(x_TI, dz_TR.shape[1], draw):
        return torch.ops.megalora.lora_down_weight_grad(dz_TR, x_TI, token_index, *_mask(draw))
    dropped = x_TI if draw is None else dropout(x_TI, token_index, draw)
    return dz_TR.t() @ dropped


def lora_down_input_grad_(
    dx_TI: torch.Tensor, dz_TR: torch.Tensor, A_RI: torch.Tensor, token_index: torch.Tensor, draw: Dropout | None
) -> None:
    """dx += mask . (dz A), in place."""
    if _compiled(dx_TI, dz_TR.shape[1], draw):
        torch.ops.megalora.lora_down_input_grad_(dx_TI, dz_TR, A_RI, token_index, *_mask(draw))
    elif draw is None:
        dx_TI.addmm_(dz_TR, A_RI)
    else:
        dropout_add_(dx_TI, dz_TR @ A_RI, token_index, draw)


def lora_up_weight_grad(dy_TO: torch.Tensor, z_TR: torch.Tensor, scaling: float) -> torch.Tensor:
    """dB [O, R] = s dy^T z, in the inputs' dtype or float32."""
    if dy_TO.device.type == "cpu" and _compiled(dy_TO, z_TR.shape[1], None):
        return torch.ops.megalora.lora_up_weight_grad(dy_TO, z_TR, scaling)
    return (dy_TO.t() @ z_TR).mul_(scaling)


_LARGEST_RANK = 192  # of the kernels


def _compiled(x_TI: torch.Tensor, rank: int, draw: Dropout | None) -> bool:
    """Whether kernels take it: on a CPU not in float16; on a GPU 16-bit floats, sizes in eights, rows on 16 bytes."""
    if not extension.has_kernels(x_TI.device.type):
        return False
    if x_TI.device.type == "cpu":
        return x_TI.dtype != torch.float16 and x_TI.stride(1) == 1
    return (
        x_TI.dtype in (torch.bfloat16, torch.float16)
        and rank % 8 == x_TI.shape[1] % 8 == x_TI.stride(0) % 8 == 0
        and rank <= _LARGEST_RANK
        and (draw is None or draw.feature_offset % 8 == 0)
    )


def _mask(draw: Dropout | None) -> tuple[int, int, int, int, float, torch.Tensor | None]:
    return (0, 0, 0, 0, 0.0, None) if draw is None else op_arguments(draw)


class _WithRoom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, room):
        ctx.columns = x.shape[1]
        wide = x.new_empty(x.shape[0], x.shape[1] + room)
        wide[:, : x.shape[1]] = x
        return wide

    @staticmethod
    def backward(ctx, dX):
        return dX[:, : ctx.columns], None


def with_room(x_TI: torch.Tensor, room: int) -> torch.Tensor:
    """A copy of x with `room` columns behind it, [T, I + C], undefined there; x itself where room is 0."""
    return _WithRoom.apply(x_TI, room) if room else x_TI
