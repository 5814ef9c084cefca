"""Parts of Triton's attention kernels: documents, and tiles of them that a program reads (see attention_kernels)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def document_of(bounds, length, EVEN: tl.constexpr):
    """Return (first token, tokens) of this program's document."""
    document = tl.program_id(1)
    if EVEN:
        start = document.to(tl.int64) * length
        count = length
    else:
        start = tl.load(bounds + document).to(tl.int64)
        count = (tl.load(bounds + document + 1).to(tl.int64) - start).to(tl.int32)
    return start, count


@triton.jit
def documents_of(bounds, key_bounds, length, EVEN: tl.constexpr, CROSS: tl.constexpr):
    """Return first token and tokens of this program's document, then those of its keys."""
    start, rows = document_of(bounds, length, EVEN)
    key_start, count = start, rows
    if CROSS:
        key_start, count = document_of(key_bounds, length, False)
    return start, rows, key_start, count


@triton.jit
def _first_number(tokens, start, count):
    """Return the number of a document's first token; 0 where it has none."""
    return tl.load(tokens + start, mask=count > 0, other=0)


@triton.jit
def drawn(
    tokens, key_tokens, start, key_start, rows, count, live_step, step, DROPS: tl.constexpr, LIVE: tl.constexpr
):  # fmt: skip
    """Return what masks are drawn from: the numbers of the first query and key, by how much tiles of keys begin before
    that, and the step.
    """
    shift, base, key_base, now = 0, start, start, step
    if DROPS:
        base, key_base = _first_number(tokens, start, rows), _first_number(key_tokens, key_start, count)
        shift = (key_base % 8).to(tl.int32)
        if LIVE:
            now = tl.load(live_step)
    return base, key_base, shift, now


@triton.jit
def of_head(slopes, sites, head, SLOPED: tl.constexpr, DROPS: tl.constexpr):
    """Return ALiBi's slope and the site of a head."""
    slope, site = 0.0, 0
    if SLOPED:
        slope = tl.load(slopes + head)
    if DROPS:
        site = tl.load(sites + head).to(tl.uint32)
    return slope, site


@triton.jit
def keys_seen(
    first, count, window, shift, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Return where the keys begin that a tile of queries from row `first` on sees, at the start of a tile of keys; then
    _whole of the tiles that each of its queries sees whole.

    Tiles of keys begin with a block of eight numbers, `shift` keys before a multiple of N.
    """
    low, high, begin, end = 0, count, 0, count
    if CAUSAL:
        high, end = tl.minimum(count, first + M), tl.minimum(count, first + 1)
    if WINDOWED:
        low, begin = tl.maximum(0, first - window + 1), tl.maximum(0, first + M - window)
        high, end = tl.minimum(high, first + M + window - 1), tl.minimum(end, first + window)
    low = (low + shift) // N * N - shift
    whole, whole_end, others_end = _whole(low, high, begin, end, N)
    return low, whole, whole_end, others_end


@triton.jit
def queries_that_see(
    at, rows, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Return where the queries begin that see a tile of keys from `at` on, at a multiple of M; then _whole of the tiles
    of which each query sees all keys.
    """
    low, high, begin, end = 0, rows, 0, rows
    if CAUSAL:
        low, begin = tl.maximum(at, 0), at + N - 1
    if WINDOWED:
        low, begin = tl.maximum(low, at - window + 1), tl.maximum(begin, at + N - window)
        high, end = tl.minimum(rows, at + N + window - 1), tl.minimum(rows, at + window)
    low = low // M * M
    whole, whole_end, others_end = _whole(low, high, begin, end, M)
    return low, whole, whole_end, others_end


@triton.jit
def _whole(low, high, begin, end, N: tl.constexpr):
    """Return, of tiles of N tokens from `low` to `high`, where those begin and end that lie from `begin` to `end`; and
    where all the others would end, counted from `low` on.

    Most tiles are seen whole: comparing each of their elements costs as much as the exponentials.
    """
    tiles = tl.maximum(high - low + N - 1, 0) // N
    before = tl.minimum(tl.maximum(begin - low + N - 1, 0) // N, tiles)
    behind = tl.maximum(tl.minimum(tl.maximum(end - low, 0) // N, tiles), before)
    return low + before * N, low + behind * N, low + (tiles - behind + before) * N


@triton.jit
def tile_at(at, whole, whole_end, OTHERS: tl.constexpr):
    """Return where a tile begins: OTHERS are counted as if none were seen whole."""
    if OTHERS and at >= whole:
        at += whole_end - whole
    return at


@triton.jit
def _place(x, start, at, local, count, stride, head, WIDE: tl.constexpr, D: tl.constexpr):
    """Return (pointers, mask) of rows at + local [ROWS] of a document, [ROWS, WIDE]."""
    features = tl.arange(0, WIDE)
    inside = ((at + local >= 0) & (at + local < count))[:, None] & (features < D)[None, :]
    first = x + (start + at) * stride + head  # what differs between elements is small: 32 bits of registers
    return first + (local[:, None] * stride + features[None, :]), inside


@triton.jit
def load(x, start, at, local, count, stride, head, WIDE: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Return rows of a document as [ROWS, WIDE], zeros outside; WHOLE: none is."""
    place, inside = _place(x, start, at, local, count, stride, head, WIDE, D)
    if WHOLE and WIDE == D:
        return tl.load(place)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def store(x, value, start, at, local, count, stride, head, WIDE: tl.constexpr, D: tl.constexpr):
    place, inside = _place(x, start, at, local, count, stride, head, WIDE, D)
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)
