"""The frozen matrix of a group of linears: what of the base a step reads, with the columns that carry its adapters.

A group's product is with P = [W | s B] (see megalora.ops.lora_linear): W of all its linears, one below the other, and
behind it `room` columns for the branches. The format of the base decides how W is held and multiplied: dense here, in 8
or 4 bits in megalora.parallel.quantised and megalora.parallel.e4m3; the branch stays exact in the compute dtype.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megalora.ops import step_linear
from megalora.ops.fp8 import Fp8Weight
from megalora.ops.matmul import matmul, matmul_nt
from megalora.ops.nf4 import Nf4Weight
from megalora.ops.step_linear import Beside
from megalora.parallel.split import Split


class WeightSource(Protocol):
    """One weight in the base's files, whole: [out, in], or [in, out] where the files have it transposed."""

    @property
    def dtype(self) -> torch.dtype: ...

    def copy(self, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copy `weight[index]` into `out` (its shape; any dtype and device)."""
        ...

    def stored(self) -> Nf4Weight | Fp8Weight | None:
        """Return the weight as the files hold it where that is quantised, on the CPU; else None."""
        ...


class Multiplier(Protocol):
    """A product with a matrix, of parts of one factor."""

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None, /) -> torch.Tensor: ...


class FrozenMatrix(Protocol):
    """[rows, columns + room], frozen but for the branch's columns."""

    rows: int
    columns: int
    room: int

    def view(self, rows: slice) -> torch.Tensor | None:
        """Return W's rows as a tensor that shares the matrix's memory; None where they are held in another form."""
        ...

    def weight(self, rows: slice) -> torch.Tensor:
        """Return W's rows [rows, columns] in the compute dtype, to be read: a view, or decoded."""
        ...

    def decode_(self, out: torch.Tensor) -> None:
        """Write W into out [rows, columns], in the compute dtype."""
        ...

    def fill(self, rows: slice, source: WeightSource, split: Split, transposed: bool) -> None:
        """Set W's rows to the part `split` of the whole weight `source`, stored as [in, out] where `transposed`."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of W and of the branch."""
        ...

    def branch(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return the place of s B of one linear, to be written: columns count from the first of the branch."""
        ...

    def clear_branch(self) -> None:
        """Set all columns of the branch to zero."""
        ...

    def branch_written(self) -> None:
        """Put what was written to `branch` in force. Call after writing, before the next product."""
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

    def multiplier(self, bias: torch.Tensor | None = None) -> Multiplier:
        """Return `multiply` for parts of one X, without a product with another matrix in between: what is decoded for
        them is decoded once.
        """
        ...

    def transposed_multiplier(self, *, branch_only: bool = False) -> Multiplier:
        """Return `multiply_transposed` for parts of one dY, as `multiplier` does."""
        ...

    def takes_beside(self, x: torch.Tensor, beside: Beside) -> bool:
        """Return whether `multiply_beside` takes it: x with z behind it, or a norm without room for a branch."""
        ...

    def multiply_beside(
        self, x: torch.Tensor, bias: torch.Tensor | None, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x + delta, the product) of x [T, columns (+ room)] by one kernel: see megalora.ops.step_linear."""
        ...


class DenseMatrix:
    """W in the compute dtype, in one piece with its branch."""

    def __init__(self, rows: int, columns: int, room: int, dtype: torch.dtype, device: torch.device | str):
        self.rows, self.columns, self.room = rows, columns, room
        self.whole = torch.empty(rows, columns + room, dtype=dtype, device=device)

    def view(self, rows: slice) -> torch.Tensor:
        return self.whole[rows, : self.columns]

    def weight(self, rows: slice) -> torch.Tensor:
        return self.view(rows)

    def decode_(self, out: torch.Tensor) -> None:
        out.copy_(self.view(slice(None)))

    def fill(self, rows: slice, source: WeightSource, split: Split, transposed: bool) -> None:
        part = self.view(rows).t() if transposed else self.view(rows)
        for theirs, ours in split.blocks():
            source.copy(theirs, part[ours])

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    def branch(self, rows: slice, columns: slice) -> torch.Tensor:
        return self.whole[rows, self.columns + columns.start : self.columns + columns.stop]

    def clear_branch(self) -> None:
        self.whole[:, self.columns :].zero_()

    def branch_written(self) -> None:
        """Do nothing: the branch stands in the matrix."""

    def multiply(
        self, X: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return matmul_nt(X, self.whole, bias, out)

    def multiply_transposed(
        self, dY: torch.Tensor, out: torch.Tensor | None = None, *, branch_only: bool = False
    ) -> torch.Tensor:
        return matmul(dY, self.whole[:, self.columns :] if branch_only else self.whole, out)

    def multiplier(self, bias: torch.Tensor | None = None) -> Multiplier:
        return lambda X, out=None: self.multiply(X, bias, out)

    def transposed_multiplier(self, *, branch_only: bool = False) -> Multiplier:
        return lambda dY, out=None: self.multiply_transposed(dY, out, branch_only=branch_only)

    def takes_beside(self, x: torch.Tensor, beside: Beside) -> bool:
        return (self.room == 0 or beside.norm is None) and step_linear.takes(x, beside)

    def multiply_beside(
        self, x: torch.Tensor, bias: torch.Tensor | None, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return step_linear.step_linear(x, self.whole, bias, beside)


class DenseView(DenseMatrix):
    """One of several matrices that lie in one tensor: `whole` [rows, columns + room] shares its memory."""

    def __init__(self, whole: torch.Tensor, columns: int):
        self.rows, self.columns, self.room = whole.shape[0], columns, whole.shape[1] - columns
        self.whole = whole
