"""The formats of the frozen base, by name: which matrix a group of linears gets."""

from __future__ import annotations

import torch

from megalora.choices import BASE_FORMATS
from megalora.parallel.base import DenseMatrix, FrozenMatrix
from megalora.parallel.quantised import Fp8Matrix, Nf4Matrix, Scratch


class BaseFormat:
    """Makes the frozen matrices of one stage: all in one format, one of choices.BASE_FORMATS, with one scratch.

    as_stored  weights that the files hold in floating point stay so in a quantised matrix (checkpoints that leave a few
               linears unquantised); else they are quantised
    """

    def __init__(self, name: str = "dense", *, as_stored: bool = False):
        assert name in BASE_FORMATS, name
        self.name, self.as_stored, self._scratch = name, as_stored, Scratch()

    @property
    def scratch(self) -> Scratch:
        """The memory that the matrices share."""
        return self._scratch

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the matrices share."""
        return self._scratch.nbytes

    def matrix(
        self, rows: int, columns: int, room: int, dtype: torch.dtype, device: torch.device | str, *, rank: int = 0
    ) -> FrozenMatrix:
        """Return a matrix [rows, columns + room] for that compute dtype, its weights not filled yet.

        rank  columns of the branch that are in use, of `room`; 0: none
        """
        if self.name == "dense":
            return DenseMatrix(rows, columns, room, dtype, device)
        return self.quantised_matrix(rows, columns, room, dtype, device, rank=rank)

    def quantised_matrix(
        self, rows: int, columns: int, room: int, dtype: torch.dtype, device: torch.device | str, *, rank: int = 0
    ) -> Fp8Matrix | Nf4Matrix:
        """Return a matrix as `matrix` does; the format is one that is quantised."""
        assert self.name != "dense"
        kind = Fp8Matrix if self.name == "fp8" else Nf4Matrix
        return kind(rows, columns, room, dtype, device, self._scratch, rank=rank, as_stored=self.as_stored)
