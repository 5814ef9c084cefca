"""The frozen matrices of a rank's experts, [W_e | s B_e] of each: in one tensor, or each in the base's format.

Legend: E experts of this rank, O rows and I columns of each, C columns of room for z, M rows of the input.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megalora.ops.grouped import Bounds, grouped, grouped_nt, parts_of, runs_grouped
from megalora.parallel.base import DenseView, FrozenMatrix
from megalora.parallel.placement import Placement
from megalora.parallel.rows_stack import RowsStack


class ExpertMatrices(Protocol):
    """branch [E, O, C]: where s B_e stand, to be written."""

    branch: torch.Tensor

    def of(self, expert: int) -> FrozenMatrix:
        """Return W of one expert, to be filled by its linears."""
        ...

    def multiply(self, X: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return X [W_e | s B_e]^T [M, O] for X [M, I + C]."""
        ...

    def multiply_transposed(
        self, dy: torch.Tensor, bounds: Bounds, dz: torch.Tensor | None, A: torch.Tensor | None
    ) -> torch.Tensor:
        """Return dy W_e + dz A_e [M, I] for dz [M, R], A [E, R, I], or the first alone."""
        ...

    @property
    def nbytes(self) -> int: ...


def expert_matrices(place: Placement, experts: int, rows: int, columns: int, room: int) -> ExpertMatrices:
    """Build the matrices of `experts` experts in the format of the placement's base, their weights not filled yet."""
    kind = DenseExperts if place.base.name == "dense" else QuantisedExperts
    return kind(place, experts, rows, columns, room)


class DenseExperts:
    """All in one tensor [E, O, I + C] in the compute dtype."""

    def __init__(self, place: Placement, experts: int, rows: int, columns: int, room: int):
        self.columns = columns
        self.whole = torch.empty(experts, rows, columns + room, dtype=place.dtype, device=place.device)
        self.branch = self.whole[:, :, columns:]

    def of(self, expert: int) -> FrozenMatrix:
        return DenseView(self.whole[expert], self.columns)

    def multiply(self, X: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        return grouped_nt(X, self.whole, bounds)

    def multiply_transposed(
        self, dy: torch.Tensor, bounds: Bounds, dz: torch.Tensor | None, A: torch.Tensor | None
    ) -> torch.Tensor:
        return grouped(dy, self.whole[:, :, : self.columns], bounds, dz, A)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes


class QuantisedExperts:
    """Each W_e in the base's format, the branches dense in one tensor.

    On a GPU all are decoded into the stage's scratch before a product, which is then the dense one; elsewhere only the
    experts that have rows are decoded.
    """

    def __init__(self, place: Placement, experts: int, rows: int, columns: int, room: int):
        self.rows, self.columns, self.room, self._place = rows, columns, room, place
        how = place.dtype, place.device
        self._matrices, self._stack = [], RowsStack(experts * rows)
        for expert in range(experts):
            matrix = place.base.expert_matrix(rows, columns, *how)
            matrix.lie_in(self._stack, expert * rows)
            self._matrices.append(matrix)
        self.branch = torch.empty(experts, rows, room, dtype=place.dtype, device=place.device)
        if runs_grouped(torch.device(place.device), place.dtype):
            place.base.scratch.reserve(experts * rows * (columns + room) * place.dtype.itemsize)

    def of(self, expert: int) -> FrozenMatrix:
        return self._matrices[expert]

    def multiply(self, X: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        if isinstance(bounds, torch.Tensor):
            return grouped_nt(X, self._decoded(), bounds)
        out = X.new_empty(X.shape[0], self.rows)
        for expert, rows in parts_of(bounds):
            out[rows] = X[rows] @ self._whole(expert).t()
        return out

    def multiply_transposed(
        self, dy: torch.Tensor, bounds: Bounds, dz: torch.Tensor | None, A: torch.Tensor | None
    ) -> torch.Tensor:
        if isinstance(bounds, torch.Tensor):
            return grouped(dy, self._decoded()[:, :, : self.columns], bounds, dz, A)
        out = dy.new_empty(dy.shape[0], self.columns)
        for expert, rows in parts_of(bounds):
            out[rows] = dy[rows] @ self._matrices[expert].weight(slice(0, self.rows))
            if dz is not None and A is not None:
                out[rows] += dz[rows] @ A[expert]
        return out

    def _whole(self, expert: int) -> torch.Tensor:
        """Return [W_e | s B_e] of one expert."""
        weight = self._matrices[expert].weight(slice(0, self.rows))
        return torch.cat([weight, self.branch[expert]], 1)

    def _decoded(self) -> torch.Tensor:
        """Return [W_e | s B_e] of all experts [E, O, I + C], in the scratch."""
        shape = len(self._matrices) * self.rows, self.columns + self.room
        scratch = self._place.base.scratch.take(shape, self._place.dtype, self._place.device)
        whole, rows = scratch.view(-1, self.rows, shape[1]), self._stack.whole()
        if rows is not None:
            rows.decode_(scratch[:, : self.columns])
        else:  # the file has them in several forms
            for matrix, out in zip(self._matrices, whole, strict=True):
                matrix.decode_(out[:, : self.columns])
        whole[:, :, self.columns :].copy_(self.branch)
        return whole

    @property
    def nbytes(self) -> int:
        return self.branch.nbytes + sum(matrix.nbytes for matrix in self._matrices)
