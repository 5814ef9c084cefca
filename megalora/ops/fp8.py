"""Weights in 8 bits: e4m3 (4 bits of exponent, 3 of mantissa) with a scale a row or a block of values.

A value is code * scale, computed in float32. Quantised here, a row has one scale: its largest magnitude is e4m3's
largest number, 448. Files of other tools bring blocks of 128 x 128 (DeepSeek) or one scale a row or a weight
(compressed-tensors).

Legend: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalora.ops import extension, limits

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
_CHUNK = 1 << 22  # values that are worked on at a time: bounds what is held beside the weight


def takes_decoded(out: torch.Tensor) -> bool:
    """Return whether kernels that decode write into out: 16-bit floats on a GPU, in octets."""
    octets = (out.shape[1], out.stride(0), out.data_ptr() // out.itemsize)
    return out.is_cuda and out.itemsize == 2 and out.stride(1) == 1 and all(n % limits.OCTET == 0 for n in octets)


@dataclass(frozen=True)
class Fp8Weight:
    """A whole weight.

    codes  [out, in] e4m3
    scale  [ceil(out / block[0]), ceil(in / block[1])] float32
    """

    codes: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]

    def rows(self, runs: Sequence[tuple[int, int]], columns: tuple[int, int]) -> list[Fp8Rows]:
        """Return the part of rows `runs`, one after another, and `columns`, ranges [start, stop) of the whole."""
        (left, right), (high, wide) = columns, self.block
        parts = []
        for start, stop in runs:
            blocks = torch.arange(start, stop, device=self.scale.device) // high
            scale = self.scale[blocks, left // wide : -(-right // wide)]
            parts.append(Fp8Rows(self.codes[start:stop, left:right], scale, wide, left % wide))
        return parts


@dataclass(frozen=True)
class Fp8Rows:
    """Rows of a weight, of the columns that a rank holds.

    codes  [rows, columns] e4m3
    scale  [rows, blocks] float32: of each row and block of `block` columns, the first of which is cut off by `phase`
    """

    codes: torch.Tensor
    scale: torch.Tensor
    block: int
    phase: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def decode_(self, out: torch.Tensor) -> None:
        """Write the values into out [rows, columns], of any floating dtype, rows of any stride."""
        rows, columns = self.codes.shape
        if extension.has_kernels("cuda") and takes_decoded(out) and self.codes.stride(0) % limits.OCTET == 0:
            torch.ops.megalora.fp8_decode_(self.codes, self.scale, self.block, self.phase, out)
            return
        if self.scale.shape[1] > 1:
            block = (torch.arange(columns, device=out.device) + self.phase) // self.block
        step = max(1, _CHUNK // max(1, columns))
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            scale = self.scale[part] if self.scale.shape[1] == 1 else self.scale[part][:, block]
            out[part].copy_(self.codes[part].float().mul_(scale))


@torch.no_grad()
def quantise_fp8(W: torch.Tensor) -> Fp8Weight:
    """Return rows W [rows, in], of any floating dtype, in e4m3 with a scale a row; on W's device.

    Not finite values give scales that are not.
    """
    codes = torch.empty(W.shape, dtype=E4M3, device=W.device)
    scale = torch.empty(W.shape[0], 1, dtype=torch.float32, device=W.device)
    step = max(1, _CHUNK // max(1, W.shape[1]))
    for first in range(0, W.shape[0], step):
        part = slice(first, first + step)
        codes[part], scale[part] = quantise_rows(W[part])
    return Fp8Weight(codes, scale, (1, max(1, W.shape[1])))


def quantise_rows(x: torch.Tensor, factor: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes [T, I] e4m3, scale [T, 1] float32) of x [T, I] (times factor [I] float32), each row by its own."""
    wide = x.float() if factor is None else x.float() * factor
    absmax = wide.abs().amax(1, keepdim=True)
    # Divided by a tensor: by a number, GPUs multiply by its inverse, which rounds otherwise than a CPU.
    scale = torch.where(absmax == 0, 1.0, absmax / torch.full_like(absmax, LARGEST))
    return (wide / scale).clamp_(-LARGEST, LARGEST).to(E4M3), scale


# ---- products of GPUs that multiply e4m3


@functools.cache
def multiplies(index: int | None) -> bool:
    """Return whether this GPU multiplies e4m3 with a scale a row of each factor."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


Room = Callable[[tuple[int, int]], torch.Tensor]  # memory for codes of a shape
# Bytes of codes of a product's other factor, unless its rows are long: of many tokens, some thousand rows at a time are
# as fast, and what all have of them would take hundreds of megabytes.
MOST_CODES = 128 << 20
_FEWEST_ROWS = 1024


def rows_at_a_time(columns: int) -> int:
    """Return how many rows of so many columns are quantised and multiplied at a time."""
    return max(1, MOST_CODES // columns // _FEWEST_ROWS) * _FEWEST_ROWS


def codes_bytes(rows: int, columns: int) -> int:
    """Return the bytes of the codes of a product of `rows` rows of up to `columns` columns."""
    return min(rows * columns, max(MOST_CODES, _FEWEST_ROWS * columns))


def _new_codes(x: torch.Tensor, shape: tuple[int, int], room: Room | None) -> torch.Tensor:
    return torch.empty(shape, dtype=E4M3, device=x.device) if room is None else room(shape)


def quantise_factor(
    x: torch.Tensor, factor: torch.Tensor | None = None, room: Room | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what quantise_rows does, but for rounding, of one factor of a product on a GPU: x [T, I] in 16 bits.

    The codes lie in new memory, or where `room` says.
    """
    x = x if x.stride(1) == 1 and x.stride(0) % limits.OCTET == 0 else x.contiguous()
    takes = x.itemsize == 2 and x.shape[1] % limits.OCTET == 0 and x.shape[1] <= limits.LARGEST_FP8_ROW
    if not (takes and x.is_cuda and extension.has_kernels("cuda")):
        return quantise_rows(x, factor)
    codes = _new_codes(x, (x.shape[0], x.shape[1]), room)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    torch.ops.megalora.fp8_quantise_(x, factor, codes, scale, None, None)
    return codes, scale


# ---- the branch in the same product


def terms_for(rank: int) -> int:
    """Return the columns of codes that a branch of R = rank takes: three a column, rounded up for products."""
    return -(-3 * rank // limits.TURNED) * limits.TURNED


def branch_terms_(branch: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, factor: torch.Tensor) -> None:
    """Write the terms of a branch s B [O, R] behind the codes of W, and what z is to be multiplied with.

    branch  [O, R] in 16 bits; scale [O] float32 of the rows of W
    codes   [O, terms_for(R)] e4m3, rows of any stride: B1 B2 B1 with s B = (B1 + B2) scale / factor but for rounding
    factor  [R] float32
    e4m3 has 3 bits of mantissa; a number and the rounding error of it have 8 together, as bfloat16. z goes in as
    z1 z1 z2, so that the products are z1 B1 + z1 B2 + z2 B1: all but z2 B2, which is below bfloat16's rounding.
    The factor balances both sides: z scaled as x is about _TYPICAL, and neither may be lost below the smallest number.
    """
    R = branch.shape[1]
    if extension.has_kernels("cuda") and branch.is_cuda:
        torch.ops.megalora.fp8_branch_(branch, scale, codes, factor)
        return
    v = branch.float() / scale.unsqueeze(1)
    largest = v.abs().amax(0)
    factor.copy_(torch.where(largest == 0, 1.0, torch.maximum((largest / _TYPICAL).sqrt() / 4, largest / LARGEST)))
    first, second = _two_terms(v / factor)
    codes.zero_()
    for i, term in enumerate((first, second, first)):
        codes[:, i * R : (i + 1) * R] = term


_TYPICAL = 64.0


def _two_terms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x as a sum of two e4m3 numbers."""
    first = x.clamp(-LARGEST, LARGEST).to(E4M3)
    return first, (x - first.float()).clamp_(-LARGEST, LARGEST).to(E4M3)


def quantise_with_branch(
    X: torch.Tensor, columns: int, rank: int, factor: torch.Tensor, room: Room | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes [T, I + terms], scale [T, 1]) of X = [x | z ...] [T, I + R or more], z as `branch_terms_` says.

    The codes lie in new memory, or where `room` says.
    """
    if not (X.stride(1) == 1 and X.stride(0) % limits.OCTET == 0):
        X = X.contiguous()
    shape = len(X), columns + terms_for(rank)
    takes = X.itemsize == 2 and columns <= limits.LARGEST_FP8_ROW and rank <= limits.LARGEST_FP8_BRANCH
    if extension.has_kernels("cuda") and X.is_cuda and takes:
        codes = _new_codes(X, shape, room)
        scale = torch.empty(len(X), 1, dtype=torch.float32, device=X.device)
        torch.ops.megalora.fp8_quantise_(X[:, :columns], None, codes, scale, X[:, columns:], factor)
        return codes, scale
    wide = torch.cat((X[:, :columns].float(), X[:, columns : columns + rank].float() * factor), 1)
    _, scale = quantise_rows(wide)
    wide /= scale
    codes = torch.zeros(shape, dtype=E4M3, device=X.device)
    codes[:, :columns] = wide[:, :columns].clamp(-LARGEST, LARGEST).to(E4M3)
    first, second = _two_terms(wide[:, columns:])
    for i, term in enumerate((first, first, second)):
        codes[:, columns + i * rank : columns + (i + 1) * rank] = term
    return codes, scale


def product(
    x: tuple[torch.Tensor, torch.Tensor],
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T + bias [T, O] in bfloat16: x (codes [T, I], scale [T, 1]), codes [O, I], scale [1, O], bias [O]."""
    mm: Any = torch._scaled_mm  # its types lack what it takes
    if out is None or not out.is_contiguous():
        y = mm(x[0], codes.t(), x[1], scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return y if out is None else out.copy_(y)
    return mm(x[0], codes.t(), x[1], scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True, out=out)


def starts_aligned(codes: torch.Tensor) -> bool:
    """Return whether rows of codes, or of other bytes, begin and end where kernels write 16 bytes at a time."""
    return codes.stride(1) == 1 and all(
        n % limits.ALIGNMENT == 0 for n in (codes.shape[1], codes.stride(0), codes.data_ptr())
    )


def turn(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Write the transpose of codes [O, I] into out [I, O]: products read both factors along what they sum over."""
    squares = all(n % limits.TURNED == 0 for n in codes.shape)
    if extension.has_kernels("cuda") and codes.is_cuda and squares and starts_aligned(out):
        torch.ops.megalora.fp8_turn_(codes, out)
    else:
        out.view(torch.uint8).copy_(codes.view(torch.uint8).t())
