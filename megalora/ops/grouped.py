"""Products of many matrices at once, each with its own rows of one input: the GEMMs of experts.

Rows [bounds[e - 1], bounds[e]) belong to matrix e; rows behind the last bound belong to none. On a GPU the bounds stay
on the device and the products are one kernel (torch's grouped GEMM), without a word from the host; what stands in rows
of no matrix is undefined then. Elsewhere they are one GEMM a matrix.

Legend: M rows, E matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from megalora.ops.matmul import matmul, matmul_nt

Bounds = tuple[int, ...] | torch.Tensor  # the end of each matrix's rows: ints, or [E] int32 on the device


def grouped_nt(X: torch.Tensor, P: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Return X P_e^T [M, N] for X [M, K], P [E, N, K]. Not for autograd."""
    if isinstance(bounds, torch.Tensor):
        return _grouped_mm()(X, P.transpose(1, 2), offs=bounds)
    out = X.new_empty(X.shape[0], P.shape[1])
    for expert, rows in parts_of(bounds):
        out[rows] = matmul_nt(X[rows], P[expert])
    return out


def grouped(X: torch.Tensor, P: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Return X P_e [M, N] for X [M, K], P [E, K, N]. Not for autograd."""
    if isinstance(bounds, torch.Tensor):
        return _grouped_mm()(X, P, offs=bounds)
    out = X.new_empty(X.shape[0], P.shape[2])
    for expert, rows in parts_of(bounds):
        out[rows] = matmul(X[rows], P[expert])
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Return a_e^T b_e [E, N, K] for a [M, N], b [M, K]: zero where a matrix has no rows. Not for autograd."""
    if isinstance(bounds, torch.Tensor):
        return _grouped_mm()(a.t(), b, offs=bounds)
    out = a.new_zeros(len(bounds), a.shape[1], b.shape[1])
    for expert, rows in parts_of(bounds):
        torch.mm(a[rows].t(), b[rows], out=out[expert])
    return out


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
