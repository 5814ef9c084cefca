"""Weights in 4 bits: NF4 with double quantisation (Dettmers et al. 2023), bit for bit as bitsandbytes stores them.

A weight W [out, in] is read row after row in blocks of 64 values. A block has its largest magnitude (absmax), and each
value is the nearest of 16 numbers times it: the quantiles of a normal distribution. The absmax of all blocks, less
their mean, are quantised in turn: blocks of 256, each value one of 256 numbers times its block's absmax. 4.127 bits a
value in all. Values are computed in float32: (number of the absmax * absmax of its block + mean) * number.

What a value becomes depends on the whole weight alone. A rank that holds a part of it holds the same values, also where
its part ends inside a block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megalora.ops import extension, limits
from megalora.ops.fp8 import takes_decoded

BLOCK, NESTED_BLOCK = 64, 256
_CHUNK = 1 << 22  # values that are worked on at a time: bounds what is held beside the weight

# Quantiles of N(0, 1) on [-1, 1], as published with the format (arXiv 2305.14314, appendix E).
NUMBERS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def nested_numbers() -> torch.Tensor:
    """Return the 256 numbers of the absmax, float32, ascending: bitsandbytes' signed dynamic map.

    Seven decades, the i-th of 2^i numbers a sign: the middles of equal steps from 0.1 to 1 of it; and 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32)


def _nearest(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest of ascending `numbers` for each of `values`, uint8; the lower one of two."""
    return torch.bucketize(values, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8)


def _blockwise(values: torch.Tensor, numbers: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (index of the nearest number for each of `values` [n] float32, absmax [blocks] float32)."""
    padded = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)
    absmax = padded.abs().amax(1)
    scaled = padded * absmax.reciprocal().unsqueeze(1)
    scaled[absmax == 0] = 0
    return _nearest(scaled.view(-1)[: len(values)], numbers), absmax


@dataclass(frozen=True)
class Absmax:
    """The absmax of all blocks of a weight.

    codes    [blocks] uint8 with `scale`; else None, and `plain` [blocks] float32 is them (not quantised in turn)
    scale    [nested blocks] float32, `numbers` [256] float32, offset float32 (a scalar tensor)
    """

    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    numbers: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    plain: torch.Tensor | None = None
    nested_block: int = NESTED_BLOCK

    def to(self, device: torch.device | str) -> Absmax:
        """Return the same on `device`."""
        values: dict[str, Any] = vars(self)
        moved: dict[str, Any] = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in values.items()}
        return Absmax(**moved)

    def at(self, blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the absmax of the blocks of these numbers, whose codes (or plain values) are `codes`."""
        if self.plain is not None:
            return codes
        assert self.numbers is not None and self.scale is not None and self.offset is not None
        nested = (blocks // self.nested_block).clamp_max(self.scale.shape[-1] - 1)  # the last row may count one more
        return self.numbers[codes.int()] * self.scale[nested] + self.offset

    def without_codes(self) -> Absmax:
        """Return what the codes mean: all but what is stored of each block."""
        return replace(self, codes=None, plain=None if self.plain is None else self.plain[:0].clone())

    @property
    def stored(self) -> torch.Tensor:
        """Return what is stored of each block: its code, or its plain value."""
        stored = self.codes if self.plain is None else self.plain
        assert stored is not None
        return stored


@dataclass(frozen=True)
class Nf4Weight:
    """A whole weight.

    codes   [ceil(out * in / 2)] uint8, the first of two values in the high half; those of rows from `origin` on, where
            it was read in part
    """

    shape: tuple[int, int]
    codes: torch.Tensor
    absmax: Absmax
    block: int = BLOCK
    origin: int = 0

    def rows(self, runs: Sequence[tuple[int, int]], columns: tuple[int, int]) -> list[Nf4Rows]:
        """Return the part of rows `runs`, one after another, and `columns`, ranges [start, stop) of the whole.

        One Nf4Rows for each run, so that rows of one follow each other in the weight.
        """
        return [self._rows(start, stop, *columns) for start, stop in runs]

    def largest(self, first: int, last: int) -> torch.Tensor:
        """Return a bound [rows] float32 of the magnitudes in rows [first, last), whole ones: the largest absmax."""
        width, stored = self.shape[1], self.absmax.stored
        start = torch.arange(first, last, device=stored.device).unsqueeze(1) * width
        per_row = torch.arange((width + 2 * self.block - 2) // self.block, device=stored.device)
        blocks = torch.minimum(start // self.block + per_row, (start + width - 1) // self.block)
        return self.absmax.at(blocks, stored[blocks]).abs().amax(1)

    def _rows(self, first: int, last: int, left: int, right: int) -> Nf4Rows:
        width, stored = self.shape[1], self.absmax.stored
        start = torch.arange(first, last, device=self.codes.device) * width + left
        per_row = (right - left + self.block - 1 + _largest_phase(width, left, self.block)) // self.block
        blocks = start.unsqueeze(1) // self.block + torch.arange(per_row, device=start.device)
        absmax = stored[blocks.clamp_(max=len(stored) - 1)]
        codes = self._nibbles(first, last, left, right)
        meaning = self.absmax.without_codes()
        return Nf4Rows(codes, absmax, meaning, first * width + left, width, right - left, self.block)

    def _nibbles(self, first: int, last: int, left: int, right: int) -> torch.Tensor:
        """Return the values' indices of a part, two a byte again, each row from a new byte on."""
        width, first, last = self.shape[1], first - self.origin, last - self.origin
        if width % 2 == left % 2 == right % 2 == 0:
            return owned(self.codes.view(-1, width // 2)[first:last, left // 2 : right // 2])
        ends = (first * width) // 2, (last * width + 1) // 2
        indices = unpacked(self.codes[ends[0] : ends[1]])[first * width % 2 :][: (last - first) * width]
        indices = indices.view(-1, width)[:, left:right]
        return packed(torch.nn.functional.pad(indices, (0, (right - left) % 2)).reshape(-1)).view(last - first, -1)

    def to(self, device: torch.device | str) -> Nf4Weight:
        """Return the same on `device`."""
        return replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device))


def owned(part: torch.Tensor) -> torch.Tensor:
    """Return a part of a tensor contiguous, in memory of its own: a view would keep the whole one."""
    whole = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
    return part if whole else part.clone(memory_format=torch.contiguous_format)


def _largest_phase(width: int, left: int, block: int) -> int:
    """Return how far inside a block a row may begin, at most."""
    return left % block if width % block == 0 else block - 1


def packed(indices: torch.Tensor) -> torch.Tensor:
    """Return two indices [n] a byte, the first in the high half; 0 behind an odd last one."""
    indices = torch.nn.functional.pad(indices, (0, len(indices) % 2))
    return indices[::2] << 4 | indices[1::2]


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """Return the indices of two a byte, [2 n] uint8 of codes [n]."""
    return torch.stack((codes >> 4, codes & 15), -1).view(-1)


@dataclass(frozen=True)
class Nf4Rows:
    """Rows that follow each other in a weight, of the columns that a rank holds.

    codes    [rows, ceil(columns / 2)] uint8, each row from a byte of its own on
    absmax   [rows, blocks a row], as `Absmax.stored` has them, from the block on in which the row begins
    meaning  of these
    first    the place of the first value in the whole weight, whose rows have `width` values
    weights  how many weights the rows are of, one below the other: the same rows of each, which has its line of
             `meaning.scale` [weights, nested blocks] and `meaning.offset` [weights]; of one: [nested blocks] and []
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    meaning: Absmax
    first: int
    width: int
    columns: int
    block: int
    weights: int = 1

    @property
    def aligned(self) -> bool:
        """Whether each row begins with a block and holds whole ones."""
        return self.width % self.block == self.first % self.block == self.columns % self.block == 0

    @property
    def nbytes(self) -> int:
        scale = self.meaning.scale
        return self.codes.nbytes + self.absmax.nbytes + (0 if scale is None else scale.nbytes)

    def decode_(self, out: torch.Tensor) -> None:
        """Write the values into out [rows, columns], of any floating dtype, rows of any stride."""
        if extension.has_kernels("cuda") and self.aligned and self.block == BLOCK and takes_decoded(out):
            m, blocks = self.meaning, (self.first // self.block, self.width // self.block)
            torch.ops.megalora.nf4_decode_(
                self.codes, self.absmax, m.scale, m.numbers, m.offset, m.nested_block, *blocks, out
            )
            return
        if self.weights > 1:
            for weight, place in enumerate(out.chunk(self.weights)):
                self.of(weight).decode_(place)
            return
        for rows in self.chunks():
            out[rows].copy_(self.values(rows))

    def of(self, weight: int) -> Nf4Rows:
        """Return the rows of one of the weights; they share the memory."""
        count, m = len(self.codes) // self.weights, self.meaning
        rows = slice(weight * count, (weight + 1) * count)
        if self.weights > 1 and m.scale is not None and m.offset is not None:
            m = replace(m, scale=m.scale[weight], offset=m.offset[weight])
        return replace(self, codes=self.codes[rows], absmax=self.absmax[rows], meaning=m, weights=1)

    def chunks(self) -> Iterator[slice]:
        """Yield ranges of rows, all of them, to be worked on one after the other."""
        step = max(1, _CHUNK // max(1, self.columns))
        for first in range(0, len(self.codes), step):
            yield slice(first, min(first + step, len(self.codes)))

    def values(self, rows: slice, factor: torch.Tensor | None = None) -> torch.Tensor:
        """Return values of some rows [n, columns] in float32; their absmax times factor [n, 1] where it is given."""
        codes, device = self.codes[rows], self.codes.device
        numbers = torch.tensor(NUMBERS, dtype=torch.float32, device=device)
        values = numbers[unpacked(codes.reshape(-1)).int()].view(len(codes), -1)[:, : self.columns]
        starts = self.first + torch.arange(rows.start, rows.stop, device=device) * self.width
        per_row = torch.arange(self.absmax.shape[1], device=device)
        absmax = self.meaning.at(starts.unsqueeze(1) // self.block + per_row, self.absmax[rows])
        if factor is not None:
            absmax = absmax * factor
        if self.aligned:
            return (values.reshape(len(codes), -1, self.block) * absmax.unsqueeze(2)).view(len(codes), -1)
        place = (starts % self.block).unsqueeze(1) + torch.arange(self.columns, device=device)
        return values * absmax.gather(1, place // self.block)


# ---- products of a few rows, without a decoded weight


def multiplies(parts: Sequence[Nf4Rows]) -> bool:
    """Return whether `product` takes these: whole blocks, with absmax in nested blocks of a power of two."""
    meanings = [part.meaning for part in parts]
    return (
        0 < len(parts) <= limits.MOST_NF4_PARTS
        and all(part.aligned and part.block == BLOCK and part.weights == 1 for part in parts)
        and all(m.scale is not None and m.nested_block & (m.nested_block - 1) == 0 for m in meanings)
    )


def product(
    X: torch.Tensor, parts: Sequence[Nf4Rows], branch: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return X [W | branch]^T + bias [T, O] of up to MOST_NF4_ROWS rows X [T, I + C], 16-bit floats on a GPU.

    W is the parts one below the other, branch [O, C]. A value of W is rounded to X's dtype as `decode_` rounds it, sums
    are in float32: the product with the decoded weight, which is never written.
    """
    return torch.ops.megalora.nf4_skinny_linear(X, *_lists(parts), branch, bias)


def _lists(parts: Sequence[Nf4Rows]) -> tuple[list[Any], ...]:
    """Return what the op takes of the parts: codes, absmax, scale, numbers, offset, nested_block, first, width."""
    meanings = [part.meaning for part in parts]
    return (
        [part.codes for part in parts],
        [part.absmax for part in parts],
        [m.scale for m in meanings],
        [m.numbers for m in meanings],
        [m.offset for m in meanings],
        [m.nested_block for m in meanings],
        [part.first // part.block for part in parts],
        [part.width // part.block for part in parts],
    )


@torch.no_grad()
def quantise_nf4(W: torch.Tensor) -> Nf4Weight:
    """Return W [out, in], of any floating dtype, in NF4; on W's device. Not finite values give absmax that are not."""
    flat, device = W.reshape(-1), W.device
    numbers = torch.tensor(NUMBERS, dtype=torch.float32, device=device)
    codes, maxima = [], []
    for start in range(0, len(flat), _CHUNK):  # a multiple of two blocks
        indices, absmax = _blockwise(flat[start : start + _CHUNK].float(), numbers, BLOCK)
        codes.append(packed(indices))
        maxima.append(absmax)
    absmax = torch.cat(maxima)
    offset = absmax.double().mean().float()  # in float64: a sum in float32 depends on the device
    nested = nested_numbers().to(device)
    absmax_codes, scale = _blockwise(absmax - offset, nested, NESTED_BLOCK)
    return Nf4Weight((W.shape[0], W.shape[1]), torch.cat(codes), Absmax(absmax_codes, scale, nested, offset))
