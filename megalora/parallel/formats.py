"""The formats of the frozen base, by name: which matrix a group of linears gets."""

from __future__ import annotations

import torch

from megalora.choices import BASE_FORMATS
from megalora.errors import UserError
from megalora.ops import fp8
from megalora.parallel.base import DenseMatrix, FrozenMatrix
from megalora.parallel.e4m3 import Fp8Matrix, Nf4AsFp8Matrix
from megalora.parallel.quantised import Nf4Matrix, Scratch


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
        if self.name == "nf4_fp8":
            _refuse_other_gpus(torch.device(device), dtype)
        kind = {"fp8": Fp8Matrix, "nf4": Nf4Matrix, "nf4_fp8": Nf4AsFp8Matrix}[self.name]
        return kind(rows, columns, room, dtype, device, self._scratch, rank=rank, as_stored=self.as_stored)

    def expert_matrix(
        self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str
    ) -> Fp8Matrix | Nf4Matrix:
        """Return a matrix of one expert, without room for a branch, which is decoded before products; the format is one
        that is quantised. With nf4_fp8 it has NF4's values as they are: nothing is multiplied in e4m3.
        """
        assert self.name != "dense"
        kind = Fp8Matrix if self.name == "fp8" else Nf4Matrix
        return kind(rows, columns, 0, dtype, device, self._scratch, as_stored=self.as_stored)


def _refuse_other_gpus(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError for a GPU on which products would not be in e4m3: no faster than nf4's, and less exact."""
    if device.type != "cuda":
        return
    if not fp8.multiplies(device.index):
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise UserError(
            f"base_format nf4_fp8: this GPU ({name}, compute capability {capability[0]}.{capability[1]}) does not "
            "multiply fp8, as those of 9.0 and later do",
            "choose nf4",
        )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"base_format nf4_fp8: dtype is {name}, and on GPUs products in fp8 go with bfloat16 alone",
            "choose dtype bfloat16, or base_format nf4",
        )
