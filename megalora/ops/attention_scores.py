"""Parts of Triton's attention kernels: products become scores, and DeBERTa's positions (see attention_kernels)."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def line_of(scale, softcap, SOFTCAP: tl.constexpr, SLOPED: tl.constexpr, OFFSETS: tl.constexpr):
    """Return (unit, shift): scores times log2(e) are unit * scores_of + shift, unit above 0. Both cost nothing in the
    exponentials: one goes into their subtraction, the other into what is subtracted.
    """
    unit, shift = scale * LOG2E, 0.0
    if SOFTCAP:  # softcap * tanh(x) = softcap * (2 sigmoid(2 x) - 1)
        unit, shift = 2.0 * softcap * LOG2E, -softcap * LOG2E
    if SLOPED or OFFSETS:
        unit, shift = 1.0, 0.0
    return unit, shift


@triton.jit
def outer_of(scale, SOFTCAP: tl.constexpr):
    """Return what products become scores by, in backward: softcap's slope is 4 (sigmoid - sigmoid^2)."""
    return 4.0 * scale if SOFTCAP else scale


@triton.jit
def scores_of(
    s, row, column, count, window, slope, offsets, of_head, longest, scale, softcap, WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SLOPED: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Return (the scores on line_of, not seen: -inf; the sigmoid of softcap, or s) of products s; row and column are
    broadcast against it, of `count` keys. WHOLE: all are seen.
    """
    sigmoid = s
    if SOFTCAP:
        root = tl.math.rsqrt(1.0 + tl.exp2(s * (-2.0 * LOG2E * scale / softcap)))  # a quotient is ten instructions
        sigmoid = root * root
        s = sigmoid
    if SLOPED or OFFSETS:
        unit, shift = line_of(scale, softcap, SOFTCAP, False, False)
        s = s * unit + shift
    if SLOPED:
        s = s - (slope * LOG2E) * tl.abs(row - column).to(tl.float32)
    if OFFSETS:
        place = tl.minimum(tl.maximum(column - row, -longest), longest) + longest
        s = s + tl.load(offsets + of_head + place) * LOG2E
    if not WHOLE:
        seen = (column >= 0) & (column < count)
        if CAUSAL:
            seen = seen & (column <= row)
        if WINDOWED:
            seen = seen & (row - column < window) & (column - row < window)
        s = tl.where(seen, s, float("-inf"))
    return s, sigmoid


@triton.jit
def gradient_of(p, dp, mean, kept_here, kept, sigmoid, DROPS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the gradient of scores over outer_of, from p and from dp, that of the probabilities that are left."""
    if DROPS:
        dp = tl.where(kept_here, dp, 0.0) * kept
    ds = p * (dp - mean)
    if SOFTCAP:
        ds = ds * (sigmoid - sigmoid * sigmoid)
    return ds


@triton.jit
def with_places(
    s, of_queries, of_keys, places, start, head, total, first, at, rows, count, far,
    C2P: tl.constexpr, P2C: tl.constexpr, PLACES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Return s [M, N], or TURNED [N, M], and what positions add to the scores of queries from `first` on and keys from
    `at` on: of_queries[query, place] and of_keys[key, place].

    Each is read with the tokens on the other side of a pair side by side, whose places are neighbours in memory.
    """
    if C2P:
        behind = first - at + tl.arange(0, M)[:, None] - tl.arange(0, N)[None, :]
        found = _of_places(of_queries, places, start, head, total, first, rows, behind, far, PLACES, M)
        s += tl.trans(found) if TURNED else found
    if P2C:
        behind = first - at + tl.arange(0, M)[None, :] - tl.arange(0, N)[:, None]
        found = _of_places(of_keys, places, start, head, total, at, count, behind, far, PLACES, N)
        s += found if TURNED else tl.trans(found)
    return s


@triton.jit
def _of_places(
    table, places, start, head, total, first, count, behind, far, PLACES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Return table[head, token, place of `behind`] of ROWS tokens of a document from `first` on; behind [ROWS, ...]."""
    local = tl.arange(0, ROWS)[:, None]
    place = tl.load(places + (tl.minimum(tl.maximum(behind, -far), far) + far))
    here = table + (tl.cast(head, tl.int64) * total + start + first) * PLACES
    return tl.load(here + (local * PLACES + place), mask=(local + first >= 0) & (local + first < count), other=0.0)


@triton.jit
def store_pairs(pairs, value, start, head, total, first, at, rows, count, width, M: tl.constexpr, N: tl.constexpr):
    """Store value [M, N] of tokens from `first` on and others from `at` on in pairs [H, T, width]."""
    local, other = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    inside = (local + first >= 0) & (local + first < rows) & (other + at >= 0) & (other + at < count)
    here = pairs + ((tl.cast(head, tl.int64) * total + start + first) * width + at)
    tl.store(here + (local * width + other), value.to(pairs.dtype.element_ty), mask=inside)
