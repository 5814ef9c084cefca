"""Frozen matrices in 8 and in 4 bits (formats: megalora.ops.fp8, megalora.ops.nf4).

A matrix is decoded before each product into a scratch [W | s B] that all matrices of a stage share, so that a product
with a quantised base is the product with a dense one of the decoded values: the same on every device and layout, but
for rounding. On GPUs a few rows (a step of generation) are multiplied by codes that are decoded on the way, with no
scratch: the same values, and a fraction of the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megalora.errors import UserError
from megalora.ops import extension, fp8, limits, nf4
from megalora.ops.fp8 import E4M3, Fp8Rows, Fp8Weight, quantise_fp8
from megalora.ops.matmul import matmul, matmul_nt
from megalora.ops.nf4 import Nf4Rows, Nf4Weight, quantise_nf4
from megalora.parallel.base import WeightSource
from megalora.parallel.rows_stack import DenseRows, Rows, RowsStack
from megalora.parallel.split import Split

Range = tuple[int, int]
Stored = Nf4Weight | Fp8Weight | None


@dataclass(frozen=True)
class _Wanted:
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


class _QuantisedMatrix:
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
            parts = self._read(source, stored, _Wanted(split.global_shape, runs, columns, transposed))
        for part in parts:
            self._put(first, part)
            first += len(part.codes)
        assert first == rows.stop, (rows, runs)

    def _read(self, source: WeightSource, stored: Stored, wanted: _Wanted) -> Sequence[Rows]:
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
        return matmul_nt(X, self._decoded(), bias, out)

    def multiply_transposed(
        self, dY: torch.Tensor, out: torch.Tensor | None = None, *, branch_only: bool = False
    ) -> torch.Tensor:
        return matmul(dY, self._branch if branch_only else self._decoded(), out)

    def _decoded(self) -> torch.Tensor:
        """Return [W | s B] in the scratch."""
        whole = self._scratch.take((self.rows, self.columns + self.room), self._dtype, self._device)
        self.decode_(whole[:, : self.columns])
        whole[:, self.columns :].copy_(self._branch)
        return whole


def _few(X: torch.Tensor, most: int) -> bool:
    """Return whether kernels that decode codes on the way take X [T, columns + room]: at most `most` rows."""
    return (
        X.is_cuda
        and extension.has_kernels("cuda")
        and len(X) <= most
        and X.itemsize == 2
        and X.stride(1) == 1
        and all(n % limits.OCTET == 0 for n in (*X.shape[1:], X.stride(0), X.data_ptr() // X.itemsize))
    )


class Nf4Matrix(_QuantisedMatrix):
    """W in NF4."""

    def multiply(
        self, X: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not (_few(X, limits.MOST_NF4_ROWS) and self._multiplied):
            return super().multiply(X, bias, out)
        y = nf4.product(X, self._multiplied, self._branch, bias)
        return y if out is None else out.copy_(y)

    def _put(self, first: int, part: Rows) -> None:
        super()._put(first, part)
        self.__dict__.pop("_multiplied", None)

    @functools.cached_property
    def _multiplied(self) -> list[Nf4Rows]:
        """The rows in their order; none where they are not multiplied as they are."""
        parts = [part for _, part in sorted(self._parts.items()) if isinstance(part, Nf4Rows)]
        return parts if len(parts) == len(self._parts) and nf4.multiplies(parts) else []

    def _read(self, source: WeightSource, stored: Stored, wanted: _Wanted) -> Sequence[Rows]:
        if isinstance(stored, Nf4Weight):
            stored = stored.to(self._device)
        else:  # the absmax are quantised relative to the mean of all, so the whole weight is needed
            stored = quantise_nf4(_whole(source, wanted, self._device))
        return stored.rows(wanted.runs, wanted.columns)


class Fp8Matrix(_QuantisedMatrix):
    """W in e4m3, with a scale a row, or with the scales of the file.

    With a scale a row, GPUs that multiply e4m3 take the codes as they are, and the other factor is quantised by row:
    faster than bfloat16, and less exact (docs/quantised.md). The scales of the rows of W come out of x W^T; into dY W
    they go with dY, so that both products are with the same codes. The second reads them turned, in the scratch. The
    branch goes into the first as terms in e4m3 that have bfloat16's precision together (fp8.branch_terms_).
    """

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        device = torch.device(self._device)
        sizes = (self.rows, self.columns, self.room)
        self._multiplies = (
            device.type == "cuda"
            and self._dtype == torch.bfloat16
            and all(n % 16 == 0 for n in sizes)
            and fp8.multiplies(device.index)
        )
        self._terms: torch.Tensor | None = None

    def lie_in(self, stack: RowsStack, first: int) -> None:
        self._multiplies = False
        super().lie_in(stack, first)

    def _scratch_bytes(self) -> int:
        return self.rows * (self.columns + self.room) if self._multiplies else super()._scratch_bytes()

    def _put(self, first: int, part: Rows) -> None:
        """Copy the rows into one matrix of codes, where all are to be multiplied as they are."""
        if self._multiplies and not (isinstance(part, Fp8Rows) and part.scale.shape[1] == 1):
            self._give_up()
        if self._multiplies and isinstance(part, Fp8Rows):
            if self._terms is None:
                self._make_room()
            rows = slice(first, first + len(part.codes))
            self._codes[rows].copy_(part.codes)
            self._scale[0, rows].copy_(part.scale[:, 0])
            part = Fp8Rows(self._codes[rows], self._scale[0, rows].unsqueeze(1), part.block, part.phase)
        super()._put(first, part)

    def _make_room(self) -> None:
        made: dict[str, Any] = {"dtype": torch.float32, "device": self._device}
        self._terms = torch.empty(self.rows, self.columns + fp8.terms_for(self.rank), dtype=E4M3, device=self._device)
        self._codes = self._terms[:, : self.columns]
        self._scale = torch.empty(1, self.rows, **made)
        self._scratch.reserve_codes(max(self._terms.shape[1], self.rows))
        self._ones = torch.ones(1, self.columns + self.room, **made)
        self._factor = torch.ones(self.rank, **made)

    def _give_up(self) -> None:
        """Decode before products: scales of blocks do not come out of them. Rows that are there move out of _codes."""
        self._multiplies = False
        if self._terms is not None:
            for first, part in self._parts.items():
                assert isinstance(part, Fp8Rows)
                self._parts[first] = replace(part, codes=part.codes.contiguous(), scale=part.scale.clone())
            self._terms = None
            del self._codes, self._scale, self._ones, self._factor

    def branch_written(self) -> None:
        """Make the terms of the branch."""
        if self._terms is not None and self.rank:
            branch = self._branch[:, : self.rank]
            fp8.branch_terms_(branch, self._scale[0], self._terms[:, self.columns :], self._factor)

    def _room_for_codes(self, shape: tuple[int, int]) -> torch.Tensor:
        return self._scratch.codes(shape, self._device)

    def multiply(
        self, X: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._terms is None:
            return super().multiply(X, bias, out)
        if _few(X, limits.MOST_SKINNY_ROWS):  # of more, the other factor is quantised: faster
            y = torch.ops.megalora.fp8_skinny_linear(X, self._codes, self._scale, self._branch, bias)
            return y if out is None else out.copy_(y)

        def of(rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            if not self.rank:
                quantised = fp8.quantise_factor(rows[:, : self.columns], None, self._room_for_codes)
                return fp8.product(quantised, self._codes, self._scale, bias, out)
            quantised = fp8.quantise_with_branch(rows, self.columns, self.rank, self._factor, self._room_for_codes)
            return fp8.product(quantised, self._terms, self._scale, bias, out)

        return _by_rows(of, X, self._terms.shape[1], self.rows, out)

    def multiply_transposed(
        self, dY: torch.Tensor, out: torch.Tensor | None = None, *, branch_only: bool = False
    ) -> torch.Tensor:
        if branch_only or self._terms is None:
            return super().multiply_transposed(dY, out, branch_only=branch_only)
        turned = self._scratch.take((self.columns + self.room, self.rows), E4M3, self._device)
        fp8.turn(self._codes, turned[: self.columns])

        def of(rows: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            quantised = fp8.quantise_factor(rows, self._scale[0], self._room_for_codes)
            return fp8.product(quantised, turned, self._ones, None, out)

        dX = _by_rows(of, dY, self.rows, self.columns + self.room, out)
        if self.room:  # behind dX there is what lay in the scratch
            torch.mm(dY, self._branch, out=dX[:, self.columns :])
        return dX

    def _read(self, source: WeightSource, stored: Stored, wanted: _Wanted) -> Sequence[Rows]:
        if self._multiplies and self._terms is None and (stored is None or _one_scale_a_row(stored)):
            self._make_room()  # before what reading takes, which would leave holes in the GPU's memory behind it
        if isinstance(stored, Fp8Weight):
            parts = stored.rows(wanted.runs, wanted.columns)
        elif wanted.transposed:
            parts = quantise_fp8(_whole(source, wanted, self._device)).rows(wanted.runs, wanted.columns)
        else:  # rows are independent of each other
            parts, width = [], wanted.shape[1]
            for start, stop in wanted.runs:
                block = torch.empty(stop - start, width, dtype=source.dtype, device=self._device)
                source.copy((slice(start, stop), slice(0, width)), block)
                parts += quantise_fp8(block).rows([(0, stop - start)], wanted.columns)
        place: dict[str, Any] = {"device": self._device}
        return [Fp8Rows(p.codes.contiguous().to(**place), p.scale.to(**place), p.block, p.phase) for p in parts]


def _one_scale_a_row(stored: Stored) -> bool:
    return isinstance(stored, Fp8Weight) and stored.scale.shape[1] == 1


def _by_rows(
    product: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    x: torch.Tensor,
    columns: int,
    outputs: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Return product(x, out) [T, outputs] of x [T, ...], as many rows at a time as codes of `columns` have room for."""
    step = fp8.rows_at_a_time(columns)
    if len(x) <= step:
        return product(x, out)
    out = x.new_empty(len(x), outputs) if out is None else out
    for rows, into in zip(x.split(step), out.split(step), strict=True):
        product(rows, into)
    return out


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


def _whole(source: WeightSource, wanted: _Wanted, device: torch.device | str) -> torch.Tensor:
    """Return the whole weight [out, in] in the file's dtype."""
    weight = torch.empty(wanted.shape, dtype=source.dtype, device=device)
    source.copy(tuple(slice(0, n) for n in wanted.shape), weight)
    return weight.t().contiguous() if wanted.transposed else weight
