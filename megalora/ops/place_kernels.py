"""A Triton kernel of DeBERTa's positions: sums over the pairs of tokens at the distances of one place.

Only megalora.ops.fused_disentangled imports this module, for triton comes with torch for GPUs alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalora.ops.attention_tiles import document_of


@triton.jit
def place_kernel(
    pairs, sums, starts, bounds, length, total, width,
    BEFORE: tl.constexpr, EVEN: tl.constexpr, PLACES: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Compute sums [H, T, PLACES] of pairs [H, T, width]: what a token has with the others of a place, in their order.

    starts [PLACES + 1] int32: place p is that of query - key from starts[p] to before starts[p + 1]; BEFORE: tokens are
    queries, so that the key of a distance stands so far before them; else they are keys, and the query behind.
    """
    start, count = document_of(bounds, length, EVEN)
    first, head = tl.program_id(0) * M, tl.program_id(2).to(tl.int64)
    if first >= count:
        return
    local = tl.arange(0, M)
    token, inside = (first + local)[:, None], (first + local < count)[:, None]
    source = pairs + (head * total + start + first) * width + (local * width)[:, None]
    target = sums + (head * total + start + first) * PLACES + (local * PLACES)[:, None]
    for at in range(0, PLACES, P):
        place = at + tl.arange(0, P)
        here = (place < PLACES)[None, :]
        low = tl.load(starts + place, mask=place < PLACES, other=0)[None, :]
        high = tl.load(starts + place + 1, mask=place < PLACES, other=0)[None, :]
        begin = token - high + 1 if BEFORE else token + low
        end = token - low + 1 if BEFORE else token + high
        begin, end = tl.maximum(begin, 0), tl.minimum(end, count)
        result = tl.zeros((M, P), tl.float32)
        for step in range(0, tl.max(tl.where(inside & here, end - begin, 0))):
            other = begin + step
            result += tl.load(source + other, mask=inside & here & (other < end), other=0.0).to(tl.float32)
        tl.store(target + place[None, :], result.to(sums.dtype.element_ty), mask=inside & here)
