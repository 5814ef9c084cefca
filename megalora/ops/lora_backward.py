"""The backward pass of the LoRA branches of one input, what is left of it once dz is known: the term of dx and dA.

    dx += mask . (dz A)        dA += dz^T dropout(x)

and where x = act(gate) * up, or act(up), was made of the linears before, on through it to them, with dB of theirs:

    [dgate | dup] = the gradient where x has that of dx        dB += s [dgate | dup]^T z

On a GPU each is one pass over what it reads, for the ranks that the kernels take. Gradients of factors are added to
what is there.

Legend: T tokens, I in_features, R rank of all branches of the input together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalora.ops import limits
from megalora.ops.dropout import Dropout
from megalora.ops.lora_linear import (
    kernels_take,
    lora_down_input_grad_,
    lora_down_weight_grad,
    lora_up_weight_grad,
    mask_arguments,
)
from megalora.ops.swiglu import swiglu_backward


@dataclass(frozen=True)
class UpBranch:
    """A branch of gate, of up, or of both in one linear, for dB.

    rows     its part of gate_up's columns
    z        [T, r] what its linear's down-projection gave
    scaling  s
    dB       [out_features, r], what the gradient is added to
    """

    rows: slice
    z: torch.Tensor
    scaling: float
    dB: torch.Tensor


def lora_backward_(
    dx_TI: torch.Tensor,
    dz_TR: torch.Tensor,
    x_TI: torch.Tensor,
    A_RI: torch.Tensor,
    token_index: torch.Tensor,
    draw: Dropout | None,
    dA: Sequence[torch.Tensor],
    out_TI: torch.Tensor | None = None,
) -> None:
    """Compute dx += mask . (dz A) in place, or out = that sum where `out` is given; dA += dz^T dropout(x).

    dA is cut into those of the branches, [r, I] each.

    The mask is drawn once. `token_index` and `draw` as in lora_down_.
    """
    rank = dz_TR.shape[1]
    if _on_gpu(dx_TI, x_TI, rank, draw, dA) and rank <= limits.LARGEST_RANK_BACKWARD:
        arguments = (token_index, *mask_arguments(draw))
        torch.ops.megalora.lora_backward_(dx_TI, dz_TR, x_TI, A_RI, *arguments, list(dA), out_TI)
        return
    lora_down_input_grad_(dx_TI, dz_TR, A_RI, token_index, draw, out_TI)
    add_down_weight_grad_(dA, dz_TR, x_TI, token_index, draw)


def add_down_weight_grad_(
    dA: Sequence[torch.Tensor],
    dz_TR: torch.Tensor,
    x_TI: torch.Tensor,
    token_index: torch.Tensor,
    draw: Dropout | None,
) -> None:
    """Compute dA += dz^T dropout(x), cut into those of the branches."""
    whole = lora_down_weight_grad(dz_TR, x_TI, token_index, draw)
    for into, grad in zip(dA, whole.split([part.shape[0] for part in dA]), strict=True):
        into.add_(grad)


def swiglu_lora_backward_(
    dx_TI: torch.Tensor,
    gate_up: torch.Tensor,
    dz_TR: torch.Tensor,
    A_RI: torch.Tensor,
    token_index: torch.Tensor,
    draw: Dropout | None,
    dA: torch.Tensor,
    ups: Sequence[UpBranch],
    act: str = "silu",
) -> torch.Tensor:
    """Return the gradient of gate_up [T, 2 I] (or [T, I], where it is up), where x made of it has the gradient
    dx + mask . (dz A).

    Adds dz^T dropout(x) to dA [R, I], and to the dB of `ups` theirs. dx is overwritten.
    """
    rank = dz_TR.shape[1]
    if (
        fuses_gated(dx_TI.device.type, rank, [branch.z.shape[1] for branch in ups])
        and _on_gpu(dx_TI, gate_up, rank, draw, [dA, *(branch.dB for branch in ups)])
        and _are_whole(ups, gate_up.shape[1])
        and gate_up.is_contiguous()
    ):
        grad, z = torch.empty_like(gate_up), None
        if ups:
            z = torch.as_strided(ups[0].z, (dx_TI.shape[0], sum(b.z.shape[1] for b in ups)), ups[0].z.stride())
        torch.ops.megalora.swiglu_lora_gradients_(
            dx_TI, gate_up, dz_TR, A_RI, token_index, *mask_arguments(draw), grad, [dA], z,
            [branch.dB for branch in ups], [branch.scaling for branch in ups], act,
        )  # fmt: skip
        return grad
    grad, x, scale = swiglu_backward(dx_TI, gate_up, (dz_TR, A_RI, token_index, draw), act)
    if scale is None:
        add_down_weight_grad_([dA], dz_TR, x, token_index, draw)
    else:  # x is dropped already
        lora_up_weight_grad(dz_TR, x, scale, dA)
    for branch in ups:
        lora_up_weight_grad(grad[:, branch.rows], branch.z, branch.scaling, branch.dB)
    return grad


def fuses_gated(device_type: str, rank: int, ups: Sequence[int]) -> bool:
    """Return whether swiglu_lora_backward_ is one pass there for so many ranks, of the input and of each branch of
    `ups`.
    """
    return device_type == "cuda" and all(
        r % limits.OCTET == 0 and r <= limits.LARGEST_RANK_GATED_BACKWARD for r in (rank, *ups)
    )


def _on_gpu(
    dx_TI: torch.Tensor, x: torch.Tensor, rank: int, draw: Dropout | None, grads: Sequence[torch.Tensor]
) -> bool:
    """Return whether kernels of a GPU take tensors like these."""
    return (
        dx_TI.device.type == "cuda"
        and kernels_take(dx_TI, rank, draw)
        and kernels_take(x, rank, draw)
        and len(grads) <= limits.MOST_BRANCHES
        and all(grad.dtype == torch.float32 and grad.is_contiguous() for grad in grads)
    )


def _are_whole(ups: Sequence[UpBranch], width: int) -> bool:
    """Return whether they are of all of gate_up [T, width], as the kernel takes them: one branch, or gate's and up's,
    their z side by side; or none.
    """
    if not ups:
        return True
    z, *others = (branch.z for branch in ups)
    if z.stride(1) != 1 or z.stride(0) % limits.OCTET != 0 or z.data_ptr() % limits.ALIGNMENT != 0:
        return False
    if not others:
        return ups[0].rows == slice(0, width)
    if [branch.rows for branch in ups] != [slice(0, width // 2), slice(width // 2, width)]:
        return False
    return others[0].stride() == z.stride() and others[0].data_ptr() - z.data_ptr() == z.shape[1] * z.itemsize
