"""Rows of quantised weights, and those of many weights in one piece, which one kernel decodes.

A layer of experts has hundreds of small weights: decoded one by one they cost more to launch than to decode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megalora.ops.fp8 import Fp8Rows
from megalora.ops.nf4 import Nf4Rows
from megalora.ops.nf4_fp8 import Nf4AsFp8Rows


@dataclass(frozen=True)
class DenseRows:
    """Rows of a weight that is not quantised: codes [rows, columns], the values."""

    codes: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def decode_(self, out: torch.Tensor) -> None:
        """Write the values into out [rows, columns]."""
        out.copy_(self.codes)


Rows = Nf4Rows | Fp8Rows | Nf4AsFp8Rows | DenseRows


class RowsStack:
    """Memory for `rows` rows, which are put there part by part, each of a weight.

    The first part decides the form. One of another form stays where it is, and then there is no whole.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._whole: Nf4Rows | Fp8Rows | None = None
        self._uneven = False

    def put(self, first: int, part: Rows) -> Rows:
        """Copy the part to row `first` and return it as it lies there; or return the part itself."""
        if self._whole is None and isinstance(part, Nf4Rows | Fp8Rows) and self._rows % len(part.codes) == 0:
            self._whole = _room_like(part, self._rows // len(part.codes))
        whole, count = self._whole, len(part.codes)
        if isinstance(whole, Fp8Rows) and isinstance(part, Fp8Rows) and _form(part) == _form(whole):
            rows = slice(first, first + count)
            whole.codes[rows].copy_(part.codes)
            whole.scale[rows].copy_(part.scale)
            return replace(whole, codes=whole.codes[rows], scale=whole.scale[rows])
        if isinstance(whole, Nf4Rows) and isinstance(part, Nf4Rows) and _fits(whole, first, part):
            there = whole.of(first // count)
            there.codes.copy_(part.codes)
            there.absmax.copy_(part.absmax)
            ours, theirs = there.meaning, part.meaning
            if ours.scale is not None and theirs.scale is not None:
                assert ours.offset is not None and theirs.offset is not None
                ours.scale.copy_(theirs.scale)
                ours.offset.copy_(theirs.offset)
            return there
        self._uneven = True
        return part

    def whole(self) -> Nf4Rows | Fp8Rows | None:
        """Return all rows; None where not all of them lie here."""
        return None if self._uneven else self._whole


def _form(rows: Fp8Rows) -> tuple:
    return rows.codes.shape[1], rows.scale.shape[1], rows.block, rows.phase


def _fits(whole: Nf4Rows, first: int, part: Nf4Rows) -> bool:
    """Return whether the part is one of the weights of the whole."""
    one, a, b = whole.of(0), whole.meaning, part.meaning
    same = ("first", "width", "columns", "block")
    return (
        len(one.codes) == len(part.codes)
        and first % len(part.codes) == 0
        and all(getattr(one, name) == getattr(part, name) for name in same)
        and a.nested_block == b.nested_block
        and (one.meaning.scale is None) == (b.scale is None)
        and (one.meaning.scale is None or b.scale is None or one.meaning.scale.shape == b.scale.shape)
        and (a.numbers is None or b.numbers is None or torch.equal(a.numbers, b.numbers))
    )


def _room_like(part: Nf4Rows | Fp8Rows, count: int) -> Nf4Rows | Fp8Rows:
    """Return memory for `count` parts like this one, one below the other."""

    def room(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(count * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)

    if isinstance(part, Fp8Rows):
        return replace(part, codes=room(part.codes), scale=room(part.scale))
    meaning = part.meaning
    if count > 1 and meaning.scale is not None and meaning.offset is not None:
        scale, offset = room(meaning.scale.unsqueeze(0)), room(meaning.offset.view(1))
        meaning = replace(meaning, scale=scale, offset=offset)
    elif meaning.scale is not None and meaning.offset is not None:
        meaning = replace(meaning, scale=torch.empty_like(meaning.scale), offset=torch.empty_like(meaning.offset))
    return replace(part, codes=room(part.codes), absmax=room(part.absmax), meaning=meaning, weights=count)
