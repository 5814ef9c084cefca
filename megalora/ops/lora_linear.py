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

import functools
from typing import Any

import torch

from megalora.ops import extension, limits
from megalora.ops.dropout import Dropout, dropout, dropout_add_, op_arguments
from megalora.ops.step_linear import Beside, is_step, step_down_

# Columns come in multiples of this many. On a GPU, GEMMs on rows of an odd stride are up to a fifth slower.
_ROOM = {"cuda": 64}
_ROOM_ELSEWHERE = 8


def room_for(rank: int, device_type: str) -> int:
    """Return C, the columns behind an input whose branches have R = rank."""
    step = _ROOM.get(device_type, _ROOM_ELSEWHERE)
    return -(-rank // step) * step


def lora_down_(
    X_TIC: torch.Tensor,
    A_RI: torch.Tensor,
    token_index: torch.Tensor,
    draw: Dropout | None,
    x_TI: torch.Tensor | None = None,
) -> None:
    """Write z = dropout(x) A^T behind x, in place, and zeros into what is left of the room.

    X [T, I + C]; A [R, I] in x's dtype; token_index [T] int64; draw None means no dropout
    x [T, I]  where given, x is read there, and written before z as well
    """
    rank, columns = A_RI.shape
    place = X_TIC[:, :columns]
    if kernels_take(place, rank, draw) and (x_TI is None or kernels_take(x_TI, rank, draw)):
        if draw is None and is_step(X_TIC):
            step_down_(place if x_TI is None else x_TI, A_RI, Beside(), X_TIC)
            return
        x, copy = (place, None) if x_TI is None else (x_TI, place)
        torch.ops.megalora.lora_down_(X_TIC[:, columns:], x, A_RI, token_index, *mask_arguments(draw), copy)
        return
    if x_TI is not None:
        place.copy_(x_TI)
    dropped = place if draw is None else dropout(place, token_index, draw)
    torch.mm(dropped, A_RI.t(), out=X_TIC[:, columns : columns + rank])
    X_TIC[:, columns + rank :].zero_()


def lora_down_weight_grad(
    dz_TR: torch.Tensor, x_TI: torch.Tensor, token_index: torch.Tensor, draw: Dropout | None
) -> torch.Tensor:
    """Return dA [R, I] = dz^T dropout(x), with the mask drawn again; in x's dtype or float32."""
    rank = dz_TR.shape[1]
    if kernels_take(x_TI, rank, draw):
        if x_TI.device.type == "cpu" or (draw is not None and rank <= _LARGEST_RANK_OF_WEIGHT_GRAD):
            return torch.ops.megalora.lora_down_weight_grad(dz_TR, x_TI, token_index, *mask_arguments(draw))
        dropped = x_TI if draw is None else dropout(x_TI, token_index, draw)
        return torch.mm(dz_TR.t(), dropped, out_dtype=torch.float32)
    dropped = x_TI if draw is None else dropout(x_TI, token_index, draw)
    return dz_TR.t() @ dropped


def lora_down_input_grad_(
    dx_TI: torch.Tensor,
    dz_TR: torch.Tensor,
    A_RI: torch.Tensor,
    token_index: torch.Tensor,
    draw: Dropout | None,
    out_TI: torch.Tensor | None = None,
) -> None:
    """Compute dx += mask . (dz A), in place; or out = that sum, where `out` is given."""
    if kernels_take(dx_TI, dz_TR.shape[1], draw):
        torch.ops.megalora.lora_down_input_grad_(dx_TI, dz_TR, A_RI, token_index, *mask_arguments(draw), out_TI)
        return
    if out_TI is not None:
        dx_TI = out_TI.copy_(dx_TI)
    if draw is None:
        dx_TI.addmm_(dz_TR, A_RI)
    else:
        dropout_add_(dx_TI, dz_TR @ A_RI, token_index, draw)


def lora_up_weight_grad(
    dy_TO: torch.Tensor, z_TR: torch.Tensor, scaling: float, into: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return dB [O, R] = s dy^T z, in the inputs' dtype or float32; or None where it was added to `into` [O, R]
    instead.
    """
    if dy_TO.device.type == "cuda" and dy_TO.dtype in _HALF and into is not None and into.dtype == torch.float32:
        torch.addmm(into, dy_TO.t(), z_TR, out_dtype=torch.float32, alpha=scaling, out=into)  # float32 throughout
        return None
    if dy_TO.device.type == "cpu" and kernels_take(dy_TO, z_TR.shape[1], None):
        dB = torch.ops.megalora.lora_up_weight_grad(dy_TO, z_TR, scaling)
    else:
        dB = (dy_TO.t() @ z_TR).mul_(scaling)
    if into is None:
        return dB
    into.add_(dB)
    return None


_HALF = (torch.bfloat16, torch.float16)
_LARGEST_RANK_OF_WEIGHT_GRAD = 64  # above it, writing dropout(x) for a GEMM is quicker, as measured on an H100


def kernels_take(x_TI: torch.Tensor, rank: int, draw: Dropout | None) -> bool:
    """Return whether kernels take it: on a CPU not in float16; on a GPU 16-bit floats, sizes in eights, rows on 16
    bytes.

    And none on a GPU whose blocks have too little shared memory.
    """
    if not extension.has_kernels(x_TI.device.type):
        return False
    if x_TI.device.type == "cpu":
        return x_TI.dtype != torch.float16 and x_TI.stride(1) == 1
    return (
        x_TI.dtype in _HALF
        and all(n % limits.OCTET == 0 for n in (rank, x_TI.shape[1], x_TI.stride(0)))
        and rank <= limits.LARGEST_RANK
        and (draw is None or draw.feature_offset % limits.OCTET == 0)
        and fits_gpu(x_TI.device.index)
    )


@functools.cache
def fits_gpu(index: int) -> bool:
    """Return whether this GPU grants a block the shared memory that the kernels ask for.

    Nothing runs there for the answer: it may be asked while a graph is captured.
    """
    properties: Any = torch.cuda.get_device_properties(index)  # torch's types lack this property
    return properties.shared_memory_per_block_optin >= limits.SHARED_MEMORY


def mask_arguments(draw: Dropout | None) -> tuple[int, int, int, int, float, torch.Tensor | None]:
    """Return the arguments of the compiled ops for a mask."""
    return (0, 0, 0, 0, 0.0, None) if draw is None else op_arguments(draw)
