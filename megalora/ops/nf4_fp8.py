"""Weights that are held in NF4 and multiplied in e4m3: NF4's values rounded to e4m3, with a scale a row.

The scale is a power of two, so that nothing is rounded but to the 3 bits of mantissa that e4m3 has: a value is the same
in float64, in float32, in 16 bits and in a product of e4m3. It belongs to the whole row of the whole weight: the least
with which the largest absmax of the row's blocks is within e4m3's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalora.ops import extension, limits
from megalora.ops.fp8 import E4M3, LARGEST, Fp8Rows, starts_aligned, turn
from megalora.ops.nf4 import BLOCK, Nf4Rows, Nf4Weight


def row_scale(largest: torch.Tensor) -> torch.Tensor:
    """Return the scale of rows whose values are at most `largest` [rows] float32: 2^k with largest / 2^k <= LARGEST.

    Not finite values give scales that are not.
    """
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent, 1/2 <= mantissa < 1
    exponent = exponent - _EXPONENT + (mantissa > _MANTISSA).to(exponent.dtype)
    bits = (exponent.clamp(-126, 126) + 127).to(torch.int32) << 23
    return torch.where(largest.isfinite(), bits.view(torch.float32), largest)


_MANTISSA, _EXPONENT = 0.875, 9  # of LARGEST


@dataclass(frozen=True)
class Nf4AsFp8Rows:
    """Rows of NF4, and what they are as e4m3.

    scale  [rows, 1] float32, as `row_scale`
    """

    rows: Nf4Rows
    scale: torch.Tensor

    @property
    def codes(self) -> torch.Tensor:
        """The codes of NF4."""
        return self.rows.codes

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scale.nbytes

    @property
    def has_kernel(self) -> bool:
        """Whether the kernel takes these rows: whole blocks, with absmax in nested blocks of a power of two."""
        rows, nested = self.rows, self.rows.meaning.nested_block
        return (
            rows.codes.is_cuda
            and extension.has_kernels("cuda")
            and rows.aligned
            and rows.block == BLOCK
            and nested & (nested - 1) == 0
            and len(rows.codes) >= limits.LEAST_NF4_TO_E4M3_ROWS
        )

    def e4m3_(self, out: torch.Tensor, terms: torch.Tensor | None = None) -> None:
        """Write the codes into out [rows, columns + T] e4m3, and behind them terms [rows, T], codes as well."""
        if self.has_kernel and starts_aligned(out) and (terms is None or starts_aligned(terms)):
            self._kernel(terms, out, turned=False)
            return
        columns = self.rows.columns
        for part in self.rows.chunks():
            values = self.rows.values(part, self.scale[part].reciprocal())
            out[part, :columns] = values.clamp_(-LARGEST, LARGEST).to(E4M3)
        if terms is not None:
            out[:, columns:] = terms

    def turned_(self, out: torch.Tensor) -> None:
        """Write the transpose of the codes into out [columns, rows] e4m3."""
        if self.has_kernel and starts_aligned(out):
            self._kernel(None, out, turned=True)
            return
        turn(self._e4m3(), out)

    def decode_(self, out: torch.Tensor) -> None:
        """Write the values into out [rows, columns], of any floating dtype, rows of any stride."""
        Fp8Rows(self._e4m3(), self.scale, self.rows.columns, 0).decode_(out)

    def _e4m3(self) -> torch.Tensor:
        codes = torch.empty(len(self.codes), self.rows.columns, dtype=E4M3, device=self.codes.device)
        self.e4m3_(codes)
        return codes

    def _kernel(self, terms: torch.Tensor | None, out: torch.Tensor, *, turned: bool) -> None:
        rows, m = self.rows, self.rows.meaning
        place = rows.first // rows.block, rows.width // rows.block
        meaning = m.scale, m.numbers, m.offset, m.nested_block
        torch.ops.megalora.nf4_to_e4m3_(
            rows.codes, rows.absmax, *meaning, *place, self.scale[:, 0], terms, out, turned
        )


def rows_as_fp8(
    weight: Nf4Weight, runs: Sequence[tuple[int, int]], columns: tuple[int, int]
) -> list[Nf4AsFp8Rows]:
    """Return the part of rows `runs` and `columns` of the weight, as `Nf4Weight.rows` does."""
    parts = weight.rows(runs, columns)
    scales = [row_scale(weight.largest(*run)).unsqueeze(1) for run in runs]
    return [Nf4AsFp8Rows(part, scale) for part, scale in zip(parts, scales, strict=True)]
