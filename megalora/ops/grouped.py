"""Products of many matrices at once, each with its own rows of one input: the GEMMs of experts.

Rows [bounds[e - 1], bounds[e]) belong to matrix e; rows behind the last bound belong to none. On a GPU the bounds stay
on the device and a product is one kernel, without a word from the host: our own on Hopper in bfloat16
(megalora.ops.grouped_gpu), else torch's grouped GEMM; what stands in rows of no matrix is undefined then. Elsewhere a
product is one GEMM a matrix.

Legend: M rows, E matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from megalora.ops import grouped_gpu
from megalora.ops.grouped_gpu import BranchGrad
from megalora.ops.matmul import matmul, matmul_nt

Bounds = tuple[int, ...] | torch.Tensor  # the end of each matrix's rows: ints, or [E] int32 on the device


def grouped_nt(X: torch.Tensor, P: torch.Tensor, bounds: Bounds, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return X P_e^T [M, N] for X [M, K], P [E, N, K]; in `out` [M, N or more] where given, 0 behind N columns. Not for
    autograd.
    """
    if isinstance(bounds, torch.Tensor):
        if grouped_gpu.takes(X, P):
            out = X.new_empty(X.shape[0], P.shape[1]) if out is None else out
            grouped_gpu.product_(out, X, P, bounds, turned=True)
            return out
        made = _grouped_mm()(X, P.transpose(1, 2), offs=bounds)
        if out is None:
            return made
        out[:, : P.shape[1]] = made
    else:
        out = X.new_empty(X.shape[0], P.shape[1]) if out is None else out
        for expert, rows in parts_of(bounds):
            out[rows, : P.shape[1]] = matmul_nt(X[rows], P[expert])
    out[:, P.shape[1] :].zero_()
    return out


def grouped(
    X: torch.Tensor, P: torch.Tensor, bounds: Bounds, Z: torch.Tensor | None = None, A: torch.Tensor | None = None
) -> torch.Tensor:
    """Return X P_e + Z A_e [M, N] for X [M, K], P [E, K, N], Z [M, R], A [E, R, N]; without Z and A the first alone.

    Not for autograd.
    """
    if isinstance(bounds, torch.Tensor):
        if grouped_gpu.takes(X, P, *(t for t in (Z, A) if t is not None)):
            out = X.new_empty(X.shape[0], P.shape[2])
            grouped_gpu.product_(out, X, P, bounds, False, Z, A)
            return out
        out = _grouped_mm()(X, P, offs=bounds)
        return out if Z is None else out.add_(_grouped_mm()(Z, A, offs=bounds))
    out = X.new_empty(X.shape[0], P.shape[2])
    for expert, rows in parts_of(bounds):
        out[rows] = matmul(X[rows], P[expert])
        if Z is not None and A is not None:
            out[rows] += matmul(Z[rows], A[expert])
    return out


def grouped_outer_(
    outs: list[torch.Tensor], a: torch.Tensor, b: torch.Tensor, bounds: Bounds, scale: float = 1.0
) -> None:
    """Add scale a_e^T b_e to outs, [E, N_i, K] of any dtype, whose rows together are the columns of a [M, N]; b [M, K].

    A matrix without rows adds nothing. Not for autograd.
    """
    assert sum(out.shape[1] for out in outs) == a.shape[1]
    if isinstance(bounds, torch.Tensor):
        if grouped_gpu.takes(a, b) and grouped_gpu.adds_to(outs, a, b):
            grouped_gpu.outer_(outs, a, b, bounds, scale)
            return
        made = _grouped_mm()(a.t(), b, offs=bounds)
        for out, part in zip(outs, made.split([out.shape[1] for out in outs], 1), strict=True):
            out.add_(part, alpha=scale)
        return
    for expert, rows in parts_of(bounds):
        made = torch.mm(a[rows].t(), b[rows])
        for out, part in zip(outs, made.split([out.shape[1] for out in outs]), strict=True):
            out[expert].add_(part, alpha=scale)


def grouped_branch_(
    grads: Sequence[BranchGrad], dy: torch.Tensor, z: torch.Tensor, B: torch.Tensor, bounds: Bounds
) -> torch.Tensor:
    """Return dz = dy B_e [M, R], and add to each of `grads` its part of dy_e^T z_e; one kernel reads dy once for both.

    dy [M, O], z [M, R], B [E, O, R]. Not for autograd.
    """
    if isinstance(bounds, torch.Tensor) and grouped_gpu.takes(dy, z, B) and grouped_gpu.joins(grads, z):
        return grouped_gpu.branch_(grads, dy, z, B, bounds)[1]
    for out, rows, columns, scale in grads:
        grouped_outer_([out], dy[:, rows], z[:, columns], bounds, scale)
    return grouped(dy, B, bounds)


def parts_of(bounds: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Yield (matrix, its rows) of each that has rows."""
    start = 0
    for expert, stop in enumerate(bounds):
        if stop > start:
            yield expert, slice(start, stop)
        start = stop


def runs_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the products are one kernel there: on a GPU from Hopper on or with a torch that has others."""
    return device.type == "cuda" and dtype == torch.bfloat16 and _grouped_mm() is not None


@functools.cache
def _grouped_mm():
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
