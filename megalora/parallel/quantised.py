"""Frozen matrices in 8 and in 4 bits (formats: megalora.ops.fp8, megalora.ops.nf4): what they share, and NF4.

Those that GPUs multiply in e4m3 are in megalora.parallel.e4m3. Any other is decoded before each product into a scratch
[W | s B] that all matrices of a stage share, so that a product with a quantised base is the product with a dense one of
the decoded values: the same on every device and layout, but for rounding. On GPUs a few rows (a step of generation) are
multiplied by codes that are decoded on the way, with no scratch: the same values, and a fraction of the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalora.errors import UserError
from megalora.ops import extension, fp8, limits, nf4
from megalora.ops.fp8 import E4M3, Fp8Weight
from megalora.ops.matmul import matmul, matmul_nt
from megalora.ops.nf4 import Nf4Rows, Nf4Weight, quantise_nf4
from megalora.ops.step_linear import Beside
from megalora.parallel.base import Multiplier, WeightSource
from megalora.parallel.rows_stack import DenseRows, Rows, RowsStack
from megalora.parallel.split import Split

Range = tuple[int, int]
Stored = Nf4Weight | Fp8Weight | None


@dataclass(frozen=True)
class Wanted:
    """What a rank holds of a whole weight.

    shape       of the whole, as the file has it: [in, out] where `transposed`, else [out, in]
    runs, columns  ranges of the rows, one after another, and of the columns of W [out, in]
    """

    shape: tuple[int, ...]
    runs: Sequence[Range]
    columns: Range
    transposed: bool


class Scratch:
    """Memory that the matrices of a stage use in turn: what is in it holds until the next product.

    All of them say what they need before the first product, so that the memory stays where it is (CUDA graphs).
    """

    def __init__(self) -> None:
        self._nbytes = 0
        self._memory: torch.Tensor | None = None
        self._columns = 0
        self._codes: list[torch.Tensor] = []
        self._recorded = False

    def reserve(self, nbytes: int) -> None:
        """Have room for so many bytes."""
        assert self._memory is None or nbytes <= self._memory.nbytes, "the scratch is in use already"
        self._nbytes = max(self._nbytes, nbytes)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """Return the memory as a tensor of that shape and dtype; what was taken before is overwritten."""
        if self._memory is None:
            self._memory = torch.empty(self._nbytes, dtype=torch.uint8, device=device)
        return self._memory[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)

    def reserve_codes(self, columns: int) -> None:
        """Have room for codes of so many columns in each row."""
        self._columns = max(self._columns, columns)

    def codes(self, shape: tuple[int, int], device: torch.device | str) -> torch.Tensor:
        """Return memory for the e4m3 codes of a product's other factor, beside what `take` returns.

        It grows with the rows; what a CUDA graph was recorded with stays. Each product's own would leave holes in the
        graphs' memory between what the layers keep.
        """
        self._recorded |= torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing()
        needed = shape[0] * shape[1]
        if not self._codes or self._codes[-1].numel() < needed:
            if not self._recorded:
                self._codes.clear()
            room = fp8.codes_bytes(shape[0], max(self._columns, shape[1]))
            self._codes.append(torch.empty(max(needed, room), dtype=E4M3, device=device))
        return self._codes[-1][:needed].view(shape)


class QuantisedMatrix:
    """What the formats share. Parts: the rows of one linear, or several that follow each other in its weight."""

    def __init__(
        self,
        rows: int,
        columns: int,
        room: int,
        dtype: torch.dtype,
        device: torch.device | str,
        scratch: Scratch,
        *,
        rank: int = 0,
        as_stored: bool = False,
    ):
        self.rows, self.columns, self.room, self.rank = rows, columns, room, rank
        self._dtype, self._device, self._scratch, self._as_stored = dtype, device, scratch, as_stored
        self._branch = torch.empty(rows, room, dtype=dtype, device=device)
        self._parts: dict[int, Rows] = {}  # by their first row
        self._stack: tuple[RowsStack, int] | None = None

    def _scratch_bytes(self) -> int:
        """Return what a product needs of the scratch."""
        return self.rows * (self.columns + self.room) * self._dtype.itemsize

    def view(self, rows: slice) -> None:
        return None

    def decode_(self, out: torch.Tensor) -> None:
        """Write W into out [rows, columns], in the compute dtype."""
        for first, part in self._parts.items():
            part.decode_(out[first : first + len(part.codes)])

    def weight(self, rows: slice) -> torch.Tensor:
        out = torch.empty(rows.stop - rows.start, self.columns, dtype=self._dtype, device=self._device)
        for first, part in self._parts.items():
            if rows.start <= first < rows.stop:
                part.decode_(out[first - rows.start :][: len(part.codes)])
        return out

    def fill(self, rows: slice, source: WeightSource, split: Split, transposed: bool) -> None:
        runs, columns = _ranges(split, transposed)
        first, stored = rows.start, source.stored()
        if stored is not None and transposed:
            raise UserError(
                f"base weights: a linear is quantised and stored as [in, out] {list(split.global_shape)}: quantised "
                f"weights are read as [out, in] only",
                "take the model's unquantised checkpoint",
            )
        if stored is None and self._as_stored:
            parts: Sequence[Any] = _dense_rows(source, split, transposed, self._dtype, self._device)
        else:
            parts = self._read(source, stored, Wanted(split.global_shape, runs, columns, transposed))
        for part in parts:
            self._put(first, part)
            first += len(part.codes)
        assert first == rows.stop, (rows, runs)

    def _read(self, source: WeightSource, stored: Stored, wanted: Wanted) -> Sequence[Rows]:
        """Return the rows that are wanted of W, quantised as the file has them (`stored`), or here."""
        raise NotImplementedError

    def lie_in(self, stack: RowsStack, first: int) -> None:
        """Keep the codes in `stack` from its row `first` on, and decode before products. Before it is filled."""
        self._stack = stack, first

    def _put(self, first: int, part: Rows) -> None:
        if self._stack is not None:
            stack, offset = self._stack
            part = stack.put(offset + first, part)
        self._parts[first] = part
        self._scratch.reserve(self._scratch_bytes())

    @property
    def nbytes(self) -> int:
        return self._branch.nbytes + sum(part.nbytes for part in self._parts.values())

    def branch(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._branch[rows, columns]

    def clear_branch(self) -> None:
        self._branch.zero_()

    def branch_written(self) -> None:
        """Do nothing: the branch is copied into the scratch for each product."""

    def multiply(
        self, X: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.multiplier(bias)(X, out)

    def multiply_transposed(
        self, dY: torch.Tensor, out: torch.Tensor | None = None, *, branch_only: bool = False
    ) -> torch.Tensor:
        return self.transposed_multiplier(branch_only=branch_only)(dY, out)

    def multiplier(self, bias: torch.Tensor | None = None) -> Multiplier:
        decoded = functools.cache(self._decoded)
        return lambda X, out=None: matmul_nt(X, decoded(), bias, out)

    def transposed_multiplier(self, *, branch_only: bool = False) -> Multiplier:
        decoded = functools.cache(self._decoded)
        return lambda dY, out=None: matmul(dY, self._branch if branch_only else decoded(), out)

    def takes_beside(self, x: torch.Tensor, beside: Beside) -> bool:
        return False

    def multiply_beside(
        self, x: torch.Tensor, bias: torch.Tensor | None, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _decoded(self) -> torch.Tensor:
        """Return [W | s B] in the scratch."""
        whole = self._scratch.take((self.rows, self.columns + self.room), self._dtype, self._device)
        self.decode_(whole[:, : self.columns])
        whole[:, self.columns :].copy_(self._branch)
        return whole


def few_rows(X: torch.Tensor, most: int) -> bool:
    """Return whether kernels that decode codes on the way take X [T, columns + room]: at most `most` rows."""
    return (
        X.is_cuda
        and extension.has_kernels("cuda")
        and len(X) <= most
        and X.itemsize == 2
        and X.stride(1) == 1
        and all(n % limits.OCTET == 0 for n in (*X.shape[1:], X.stride(0), X.data_ptr() // X.itemsize))
    )


class Nf4Matrix(QuantisedMatrix):
    """W in NF4."""

    def multiplier(self, bias: torch.Tensor | None = None) -> Multiplier:
        by_decoded = super().multiplier(bias)

        def product(X: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            if not (few_rows(X, limits.MOST_NF4_ROWS) and self._multiplied):
                return by_decoded(X, out)
            y = nf4.product(X, self._multiplied, self._branch, bias)
            return y if out is None else out.copy_(y)

        return product

    def _put(self, first: int, part: Rows) -> None:
        super()._put(first, part)
        self.__dict__.pop("_multiplied", None)

    @functools.cached_property
    def _multiplied(self) -> list[Nf4Rows]:
        """The rows in their order; none where they are not multiplied as they are."""
        parts = [part for _, part in sorted(self._parts.items()) if isinstance(part, Nf4Rows)]
        return parts if len(parts) == len(self._parts) and nf4.multiplies(parts) else []

    def _read(self, source: WeightSource, stored: Stored, wanted: Wanted) -> Sequence[Rows]:
        return in_nf4(source, stored, wanted, self._device).rows(wanted.runs, wanted.columns)


def in_nf4(source: WeightSource, stored: Stored, wanted: Wanted, device: torch.device | str) -> Nf4Weight:
    """Return the weight as the file has it (`stored`), or quantised here."""
    if isinstance(stored, Nf4Weight):
        return stored.to(device)
    return quantise_nf4(whole_weight(source, wanted, device))  # absmax are quantised relative to the mean of all


def _dense_rows(
    source: WeightSource, split: Split, transposed: bool, dtype: torch.dtype, device: torch.device | str
) -> list[Rows]:
    part = torch.empty(split.local_shape, dtype=dtype, device=device)
    for theirs, ours in split.blocks():
        source.copy(theirs, part[ours])
    return [DenseRows(part.t().contiguous() if transposed else part)]


def _ranges(split: Split, transposed: bool) -> tuple[list[Range], Range]:
    """Return (rows, columns) of W [out, in] that are this rank's: ranges of the rows, one of the columns."""
    shape = split.global_shape[::-1] if transposed else split.global_shape
    dim = split.dim if split.dim is None or not transposed else 1 - split.dim
    if dim == 0:
        return [(run.start, run.stop) for run in split.runs], (0, shape[1])
    rows = [(0, shape[0])]
    if dim is None:
        return rows, (0, shape[1])
    assert len(split.runs) <= 1, "a row-parallel weight is cut into ranges"
    return rows, split.runs[0][:2] if split.runs else (0, 0)


def whole_weight(source: WeightSource, wanted: Wanted, device: torch.device | str) -> torch.Tensor:
    """Return the whole weight [out, in] in the file's dtype."""
    weight = torch.empty(wanted.shape, dtype=source.dtype, device=device)
    source.copy(tuple(slice(0, n) for n in wanted.shape), weight)
    return weight.t().contiguous() if wanted.transposed else weight
