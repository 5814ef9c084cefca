"""The frozen matrix of a group of linears: what of the base a step reads, with the columns that carry its adapters.

A group's product is with P = [W | s B] (see megalora.ops.lora_linear): W of all its linears, one below the other, and
behind it `room` columns for the branches. A format of the base (dense today) decides how W is held and multiplied; the
branch stays exact in the compute dtype.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megalora.ops.matmul import matmul, matmul_nt


class FrozenMatrix(Protocol):
    """[rows, columns + room], frozen but for the branch's columns."""

    rows: int
    columns: int
    room: int

    def view(self, rows: slice) -> torch.Tensor:
        """Return W's rows as a tensor that shares the matrix's memory: loading writes W through it."""
        ...

    def branch(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return the place of s B of one linear, to be written: columns count from the first of the branch."""
        ...

    def clear_branch(self) -> None:
        """Set all columns of the branch to zero."""
        ...

    def multiply(
        self, X: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return X P^T (+ bias): X [T, columns + room] -> [T, rows]."""
        ...

    def multiply_transposed(
        self, dY: torch.Tensor, out: torch.Tensor | None = None, *, branch_only: bool = False
    ) -> torch.Tensor:
        """Return dY P: dY [T, rows] -> [T, columns + room], or its last `room` columns alone."""
        ...


class DenseMatrix:
    """W in the compute dtype, in one piece with its branch."""

    def __init__(self, rows: int, columns: int, room: int, dtype: torch.dtype, device: torch.device | str):
        self.rows, self.columns, self.room = rows, columns, room
        self.whole = torch.empty(rows, columns + room, dtype=dtype, device=device)

    def view(self, rows: slice) -> torch.Tensor:
        return self.whole[rows, : self.columns]

    def branch(self, rows: slice, columns: slice) -> torch.Tensor:
        return self.whole[rows, self.columns + columns.start : self.columns + columns.stop]

    def clear_branch(self) -> None:
        self.whole[:, self.columns :].zero_()

    def multiply(
        self, X: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return matmul_nt(X, self.whole, bias, out)

    def multiply_transposed(
        self, dY: torch.Tensor, out: torch.Tensor | None = None, *, branch_only: bool = False
    ) -> torch.Tensor:
        return matmul(dY, self.whole[:, self.columns :] if branch_only else self.whole, out)
