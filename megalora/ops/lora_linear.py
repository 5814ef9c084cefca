"""The five pieces of a LoRA branch that a linear composes, in plain torch.

    z   = dropout(x) A^T                 lora_down
    y  += s z B^T                        lora_up_
    dz  = s dy B,  dB = s dy^T z         lora_up_backward
    dA  = dz^T dropout(x)                lora_down_weight_grad   (the mask is drawn again, never stored)
    dx += mask . (dz A)                  lora_down_input_grad_

Legend: T tokens, I in_features, O out_features, R the rank (of all branches of one input together, where they share
it). x, y, dy, dx are in the compute dtype; A [R, I] and B [O, R] are masters in float32 (or float64) and are cast here.
Gradients of A and B come back in the masters' dtype.
"""

from __future__ import annotations

import torch

from megalora.ops.dropout import Dropout, dropout, dropout_add_


def lora_down(x_TI: torch.Tensor, A_RI: torch.Tensor, token_index: torch.Tensor, draw: Dropout | None) -> torch.Tensor:
    """z [T, R] = dropout(x) A^T; draw None means no dropout."""
    dropped = x_TI if draw is None else dropout(x_TI, token_index, draw)
    return dropped @ A_RI.to(x_TI.dtype).t()


def lora_up_(y_TO: torch.Tensor, z_TR: torch.Tensor, B_OR: torch.Tensor, scaling: float) -> torch.Tensor:
    """y += scaling * z B^T, in place."""
    return y_TO.addmm_(z_TR, B_OR.to(y_TO.dtype).t(), alpha=scaling)


def lora_up_backward(
    dy_TO: torch.Tensor, z_TR: torch.Tensor, B_OR: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dz [T, R], dB [O, R]) of `lora_up_`."""
    dz = (dy_TO @ B_OR.to(dy_TO.dtype)).mul_(scaling)
    return dz, (dy_TO.t() @ z_TR).to(B_OR.dtype).mul_(scaling)


def lora_down_weight_grad(
    dz_TR: torch.Tensor,
    x_TI: torch.Tensor,
    A_RI: torch.Tensor,
    token_index: torch.Tensor,
    draw: Dropout | None,
) -> torch.Tensor:
    """dA [R, I] of `lora_down`, with the mask drawn again."""
    dropped = x_TI if draw is None else dropout(x_TI, token_index, draw)
    return (dz_TR.t() @ dropped).to(A_RI.dtype)


def lora_down_input_grad_(
    dx_TI: torch.Tensor,
    dz_TR: torch.Tensor,
    A_RI: torch.Tensor,
    token_index: torch.Tensor,
    draw: Dropout | None,
) -> torch.Tensor:
    """dx += mask . (dz A), in place."""
    A = A_RI.to(dx_TI.dtype)
    if draw is None:
        return dx_TI.addmm_(dz_TR, A)
    dropout_add_(dx_TI, dz_TR @ A, token_index, draw)
    return dx_TI
