"""Frozen matrices that GPUs multiply in e4m3: held in it, or in NF4."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from megalora.ops import fp8, limits, step_linear
from megalora.ops.fp8 import E4M3, Fp8Rows, Fp8Weight, quantise_fp8
from megalora.ops.nf4 import owned
from megalora.ops.nf4_fp8 import Nf4AsFp8Rows, rows_as_fp8
from megalora.ops.step_linear import Beside
from megalora.parallel.base import FrozenMatrix, Multiplier, WeightSource
from megalora.parallel.quantised import QuantisedMatrix, Stored, Wanted, few_rows, in_nf4, whole_weight
from megalora.parallel.rows_stack import Rows, RowsStack


class E4m3Matrix(QuantisedMatrix):
    """What the formats share whose products are in e4m3, with a scale a row, on GPUs that multiply it.

    There the other factor is quantised by row: faster than bfloat16, and less exact (docs/quantised.md). The scales of
    the rows of W come out of x W^T; into dY W they go with dY, so that both products are with the same codes. The
    second reads them turned, in the scratch. The branch goes into the first as terms in e4m3 that have bfloat16's
    precision together (fp8.branch_terms_). Elsewhere, and where rows have no such scale, W is decoded.
    """

    _keeps_codes = True  # whether they are there throughout, not made for each product

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        device = torch.device(self._device)
        sizes = (self.rows, self.columns, self.room)
        self._could = device.type == "cuda" and self._dtype == torch.bfloat16 and fp8.multiplies(device.index)
        self._multiplies = self._could and all(n % 16 == 0 for n in sizes)
        self._terms: torch.Tensor | None = None  # of the branch [rows, terms], where products are in e4m3
        if self._multiplies:
            self._make_room()  # before what reading takes, between which it would leave holes in the GPU's memory

    @property
    def falls_back(self) -> bool:
        """Whether this GPU multiplies e4m3, and yet W is decoded before each product. Not of experts, all of which are.
        """
        return self._could and not self._multiplies and self._stack is None

    def _takes(self, part: Rows) -> bool:
        """Return whether products in e4m3 are possible with these rows."""
        raise NotImplementedError

    def _settled(self, part: Rows, rows: slice) -> Rows:
        """Return the part, which `_takes` has let pass, as it is kept: its scales are those of `rows`."""
        raise NotImplementedError

    def _make_terms(self, columns: int) -> torch.Tensor:
        """Return memory for the terms of the branch [rows, columns]."""
        raise NotImplementedError

    def _coded(self) -> torch.Tensor:
        """Return the codes of [W | terms of the branch], to be read before the next product."""
        raise NotImplementedError

    def _turn(self, out: torch.Tensor) -> None:
        """Write the transpose of W's codes into out [columns, rows]."""
        raise NotImplementedError

    def lie_in(self, stack: RowsStack, first: int) -> None:
        self._give_up()
        super().lie_in(stack, first)

    def _scratch_bytes(self) -> int:
        return self.rows * (self.columns + self.room) if self._multiplies else super()._scratch_bytes()

    def _put(self, first: int, part: Rows) -> None:
        if self._multiplies and not self._takes(part):
            self._give_up()
        if self._multiplies:
            if self._terms is None:
                self._make_room()
            part = self._settled(part, slice(first, first + len(part.codes)))
        super()._put(first, part)

    def _make_room(self) -> None:
        made: dict[str, Any] = {"dtype": torch.float32, "device": self._device}
        terms = fp8.terms_for(self.rank)
        self._terms = self._make_terms(terms)
        self._scale = torch.empty(1, self.rows, **made)
        self._scratch.reserve_codes(max(self.columns + terms, self.rows))
        self._ones = torch.ones(1, self.columns + self.room, **made)
        self._factor = torch.ones(self.rank, **made)

    def _give_up(self) -> None:
        """Decode before products. Rows that are there have scales of their own from now on."""
        self._multiplies = False
        if self._terms is not None:
            self._terms = None
            del self._scale, self._ones, self._factor

    def branch_written(self) -> None:
        """Make the terms of the branch."""
        if self._terms is not None and self.rank:
            fp8.branch_terms_(self._branch[:, : self.rank], self._scale[0], self._terms, self._factor)

    def _room_for_codes(self, shape: tuple[int, int]) -> torch.Tensor:
        return self._scratch.codes(shape, self._device)

    def multiplier(self, bias: torch.Tensor | None = None) -> Multiplier:
        if self._terms is None:
            return super().multiplier(bias)
        coded = self._coded if self._keeps_codes else functools.cache(self._coded)
        columns = self.columns + self._terms.shape[1]

        def quantised(X: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            if self.rank:
                factor = fp8.quantise_with_branch(X, self.columns, self.rank, self._factor, self._room_for_codes)
            else:
                factor = fp8.quantise_factor(X[:, : self.columns], None, self._room_for_codes)
            return fp8.product(factor, coded(), self._scale, bias, out)

        def product(X: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            if not few_rows(X, limits.MOST_SKINNY_ROWS):  # of more, the other factor is quantised: faster
                return _by_rows(quantised, X, columns, self.rows, out)
            codes = coded()[:, : self.columns]
            y = torch.ops.megalora.fp8_skinny_linear(X, codes, self._scale, self._branch, bias, self._keeps_codes)
            return y if out is None else out.copy_(y)

        return product

    def takes_beside(self, x: torch.Tensor, beside: Beside) -> bool:
        alone = self.room == 0 or beside.norm is None
        return self._terms is not None and alone and step_linear.takes(x, beside)

    def multiply_beside(
        self, x: torch.Tensor, bias: torch.Tensor | None, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self._coded()[:, : self.columns]
        return step_linear.fp8_step_linear(x, codes, self._scale, self._branch, bias, self._keeps_codes, beside)

    def transposed_multiplier(self, *, branch_only: bool = False) -> Multiplier:
        if branch_only or self._terms is None:
            return super().transposed_multiplier(branch_only=branch_only)
        turned = functools.cache(self._turned)

        def quantised(dY: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            factor = fp8.quantise_factor(dY, self._scale[0], self._room_for_codes)
            return fp8.product(factor, turned(), self._ones, None, out)

        def product(dY: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            dX = _by_rows(quantised, dY, self.rows, self.columns + self.room, out)
            if self.room:  # behind dX there is what lay in the scratch
                torch.mm(dY, self._branch, out=dX[:, self.columns :])
            return dX

        return product

    def _turned(self) -> torch.Tensor:
        """Return the codes turned, and below them some of `room` rows, in the scratch."""
        turned = self._scratch.take((self.columns + self.room, self.rows), E4M3, self._device)
        self._turn(turned[: self.columns])
        return turned


class Fp8Matrix(E4m3Matrix):
    """W in e4m3, with a scale a row, or with the scales of the file: those of blocks do not come out of a product."""

    def _takes(self, part: Rows) -> bool:
        return isinstance(part, Fp8Rows) and part.scale.shape[1] == 1

    def _make_terms(self, columns: int) -> torch.Tensor:
        self._whole = torch.empty(self.rows, self.columns + columns, dtype=E4M3, device=self._device)
        return self._whole[:, self.columns :]

    def _settled(self, part: Rows, rows: slice) -> Rows:
        """Copy the rows into one matrix of codes."""
        assert isinstance(part, Fp8Rows)
        codes, scale = self._whole[rows, : self.columns], self._scale[0, rows].unsqueeze(1)
        return replace(part, codes=codes.copy_(part.codes), scale=scale.copy_(part.scale))

    def _give_up(self) -> None:
        if self._terms is not None:
            for first, part in self._parts.items():
                assert isinstance(part, Fp8Rows)
                self._parts[first] = replace(part, codes=part.codes.contiguous(), scale=part.scale.clone())
            del self._whole
        super()._give_up()

    def _coded(self) -> torch.Tensor:
        return self._whole

    def _turn(self, out: torch.Tensor) -> None:
        fp8.turn(self._whole[:, : self.columns], out)

    def _read(self, source: WeightSource, stored: Stored, wanted: Wanted) -> Sequence[Rows]:
        if isinstance(stored, Fp8Weight):
            parts = stored.rows(wanted.runs, wanted.columns)
        elif wanted.transposed:
            parts = quantise_fp8(whole_weight(source, wanted, self._device)).rows(wanted.runs, wanted.columns)
        else:  # rows are independent of each other
            parts, width = [], wanted.shape[1]
            for start, stop in wanted.runs:
                block = torch.empty(stop - start, width, dtype=source.dtype, device=self._device)
                source.copy((slice(start, stop), slice(0, width)), block)
                parts += quantise_fp8(block).rows([(0, stop - start)], wanted.columns)
        place: dict[str, Any] = {"device": self._device}
        return [Fp8Rows(owned(p.codes).to(**place), owned(p.scale).to(**place), p.block, p.phase) for p in parts]


class Nf4AsFp8Matrix(E4m3Matrix):
    """W held in NF4, its values those of e4m3 with a scale a row (megalora.ops.nf4_fp8).

    For products in e4m3 the codes are made in the scratch each time, as they lie or turned.
    """

    _keeps_codes = False

    def _takes(self, part: Rows) -> bool:
        return isinstance(part, Nf4AsFp8Rows) and part.has_kernel

    def _make_terms(self, columns: int) -> torch.Tensor:
        return torch.empty(self.rows, columns, dtype=E4M3, device=self._device)

    def _settled(self, part: Rows, rows: slice) -> Rows:
        assert isinstance(part, Nf4AsFp8Rows)
        return replace(part, scale=self._scale[0, rows].unsqueeze(1).copy_(part.scale))

    def _scratch_bytes(self) -> int:
        terms = fp8.terms_for(self.rank)
        return self.rows * (self.columns + max(self.room, terms)) if self._multiplies else super()._scratch_bytes()

    def _coded(self) -> torch.Tensor:
        assert self._terms is not None
        width = self.columns + self._terms.shape[1]
        coded = self._scratch.take((self.rows, width), E4M3, self._device)
        for rows, part in self._each():
            part.e4m3_(coded[rows], self._terms[rows] if self.rank else None)
        return coded

    def _turn(self, out: torch.Tensor) -> None:
        for rows, part in self._each():
            part.turned_(out[:, rows])

    def _each(self) -> Iterator[tuple[slice, Nf4AsFp8Rows]]:
        for first, part in self._parts.items():
            assert isinstance(part, Nf4AsFp8Rows)
            yield slice(first, first + len(part.codes)), part

    def _read(self, source: WeightSource, stored: Stored, wanted: Wanted) -> Sequence[Rows]:
        return rows_as_fp8(in_nf4(source, stored, wanted, self._device), wanted.runs, wanted.columns)


def decoded_note(matrices: Iterable[tuple[FrozenMatrix, Sequence[str]]]) -> tuple[str, ...]:
    """Return a line on the linears whose quantised base is decoded where others are multiplied as they are; or none.

    matrices  each with the names of its linears
    """
    names = {
        name.rsplit(".", 1)[-1]
        for matrix, linears in matrices
        if isinstance(matrix, E4m3Matrix) and matrix.falls_back
        for name in linears
    }
    if not names:
        return ()
    return (
        f"base weights: these linears are decoded to bfloat16 before each product, which is slower than to multiply "
        f"them in fp8: {', '.join(sorted(names))} (a size is not a multiple of 16, or the file's scales are not of "
        f"whole rows; docs/quantised.md)",
    )


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
