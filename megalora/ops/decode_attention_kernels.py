"""Attention of one new token of each of several sequences over a cache, in Triton: heads that the compiled kernels
(csrc/cuda/decode_attention.cu) are not made for, as Qwen3.5's of 256 features.

    decode_part_kernel    a part of the tokens of one sequence and key head, for all queries that read it
    decode_reduce_kernel  the parts of one query head: their softmax is put together (Milakov and Gimelshein 2018)

Grids depend on shapes alone, so that a CUDA graph can hold them; lengths are read on the device. Each is compiled once
for all numbers of sequences. Only a GPU's path imports this module.

Legend: as in megalora.ops.decode_attention; P parts, G = H / K queries of a key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PROGRAMS = 4 * 132  # a few for each multiprocessor of a large GPU
_MOST_PARTS = 64
_LEAST_SIDE = 16  # of a product on tensor cores: queries and features are filled up


@triton.jit(do_not_specialize=["parts", "window"])
def decode_part_kernel(
    q, k, v, keys, values, slots, positions, sums, states, q_row, q_head, k_row, k_head, v_row, v_head,
    capacity, parts, window, scale,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write sums [B, K, P, G, D] of values, and states [B, K, P, G, 2]: the largest score and the sum of weights.

    The new token belongs to the first part, which keeps it in the cache too; what came before it is shared by all.
    window 0: none; grid (P, K, B)
    """
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot, position = tl.load(slots + row), tl.load(positions + row).to(tl.int32)
    g, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_d, in_g = d < DIM, g < GROUP
    inside = in_g[:, None] & in_d[None, :]
    queries = tl.load(q + row * q_row + (head * GROUP + g)[:, None] * q_head + d[None, :], mask=inside, other=0.0)
    kept = (slot * KEY_HEADS + head) * capacity * DIM
    keys += kept
    values += kept

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    if part == 0:
        k_new = tl.load(k + row * k_row + head * k_head + d, mask=in_d, other=0.0)
        v_new = tl.load(v + row * v_row + head * v_head + d, mask=in_d, other=0.0)
        tl.store(keys + position.to(tl.int64) * DIM + d, k_new, mask=in_d)
        tl.store(values + position.to(tl.int64) * DIM + d, v_new, mask=in_d)
        largest = tl.sum(queries.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
        total += 1.0
        summed += v_new.to(tl.float32)[None, :]
    oldest = 0
    if window > 0:
        oldest = tl.maximum(position + 1 - window, 0)
    share = tl.cdiv(tl.cdiv(position - oldest, parts), TOKENS) * TOKENS
    begin = oldest + part * share
    end = tl.minimum(begin + share, position)
    for first in range(begin, end, TOKENS):
        at = first + tl.arange(0, TOKENS)
        seen = at < end
        place = at.to(tl.int64)[:, None] * DIM + d[None, :]
        there = seen[:, None] & in_d[None, :]
        k_seen = tl.load(keys + place, mask=there, other=0.0)
        v_seen = tl.load(values + place, mask=there, other=0.0)
        scores = tl.where(seen[None, :], tl.dot(queries, tl.trans(k_seen)) * scale, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        shrink, weights = tl.exp(largest - now), tl.exp(scores - now[:, None])
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v_seen.dtype), v_seen)
        largest = now

    of_part = ((row * KEY_HEADS + head) * parts + part) * GROUP + g
    tl.store(states + of_part * 2, largest, mask=in_g)
    tl.store(states + of_part * 2 + 1, total, mask=in_g)
    if (part == 0) | (begin < end):  # a part without tokens leaves its values unset
        tl.store(sums + of_part[:, None] * DIM + d[None, :], summed, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def decode_reduce_kernel(
    sums, states, out, parts,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, MOST_PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write out [B, H, D]; grid (H, B)."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p, d = tl.arange(0, MOST_PARTS), tl.arange(0, COLUMNS)
    at = ((row * KEY_HEADS + head // GROUP) * parts + p) * GROUP + head % GROUP
    largest = tl.load(states + at * 2, mask=p < parts, other=float("-inf"))
    share = tl.exp(largest - tl.max(largest, 0))  # the first part has a token: the largest of all is a number
    total = tl.sum(tl.load(states + at * 2 + 1, mask=p < parts, other=0.0) * share, 0)
    inside = (share > 0)[:, None] & (d < DIM)[None, :]
    summed = tl.load(sums + at[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    result = tl.sum(summed * share[:, None], 0) / total
    tl.store(out + (row * KEY_HEADS * GROUP + head) * DIM + d, result.to(out.dtype.element_ty), mask=d < DIM)


def tiled_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Return as `decode_attention`, of what these kernels take (decode_attention.tiles)."""
    (count, heads, dim), (key_heads, capacity) = q.shape, keys.shape[1:3]
    group = heads // key_heads
    tokens = 64 if dim <= 128 else 32
    parts = max(1, min(_PROGRAMS // (count * key_heads), triton.cdiv(capacity, tokens), _MOST_PARTS))
    sums = torch.empty(count, key_heads, parts, group, dim, dtype=torch.float32, device=q.device)
    states, out = sums.new_empty(*sums.shape[:-1], 2), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    columns = max(_LEAST_SIDE, triton.next_power_of_2(dim))
    decode_part_kernel[(parts, key_heads, count)](
        q, k, v, keys, values, slots, positions, sums, states, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        capacity, parts, window or 0, scale,
        key_heads, group, dim, max(_LEAST_SIDE, triton.next_power_of_2(group)), columns, tokens,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    decode_reduce_kernel[(heads, count)](
        sums, states, out, parts, key_heads, group, dim, _MOST_PARTS, columns, num_warps=4
    )
    return out
