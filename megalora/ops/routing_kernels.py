"""Triton kernels of experts: the order of rows, the gate with the weights of pairs in it, forward and backward, and the
sum over a token's pairs. One pass over memory each, where torch takes four to six; two for the order, where a sort
and what belongs to it take twenty.

Only a GPU's path imports this module (megalora.ops.routing, megalora.ops.weighted_gate). `count` holds how many rows
belong to experts of the rank: those behind are passed over, and hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dispatch_kernel(
    x, places, own, out, size, x_stride, out_stride, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute out[places[pair], :size] = x[token, :size] for each own pair of a token, whose row is read once."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + token * x_stride + columns, mask=inside)
    for choice in range(CHOICES):
        pair = token * CHOICES + choice
        mine = tl.load(own + pair) != 0
        place = tl.load(places + pair)
        tl.store(out + place * out_stride + columns, values, mask=inside & mine)


@triton.jit
def gate_kernel(gate_up, weights, pair, count, out, size, out_stride, BLOCK: tl.constexpr):
    """Compute out[row, :size] = weights[pair[row]] * silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < size) & (row < tl.load(count))
    place = gate_up + row * 2 * size + columns
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + size, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + tl.load(pair + row))
    tl.store(out + row * out_stride + columns, gate * tl.sigmoid(gate) * up * weight, mask=inside)


@triton.jit
def gate_backward_kernel(
    dh, gate_up, weights, pair, count, grad, dweights, size, dh_stride, AGAIN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute grad = that of gate_up where weights * silu(gate) * up has dh; dweights[row] = the sum of dh silu(gate)
    up. AGAIN: write weights * silu(gate) * up over dh.
    """
    row = tl.program_id(0).to(tl.int64)
    own = row < tl.load(count)
    weight = tl.load(weights + tl.load(pair + row))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = (columns < size) & own
        place = row * 2 * size + columns
        gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + place + size, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dh + row * dh_stride + columns, mask=inside, other=0.0).to(tl.float32)
        opened = tl.sigmoid(gate)
        silu = gate * opened
        total += d * silu * up
        if AGAIN:
            tl.store(dh + row * dh_stride + columns, silu * up * weight, mask=inside)
        d = d * weight
        tl.store(grad + place, d * up * opened * (1.0 + gate * (1.0 - opened)), mask=inside)
        tl.store(grad + place + size, d * silu, mask=inside)
    tl.store(dweights + row, tl.sum(total, 0))


@triton.jit
def combine_kernel(rows, places, own, out, size, stride, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out[token] = the sum over its own pairs of rows[places[pair]], in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(CHOICES):
        pair = token * CHOICES + choice
        mine = tl.load(own + pair) != 0
        place = tl.load(places + pair)
        total += tl.load(rows + place * stride + columns, mask=inside & mine, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, total, mask=inside)


@triton.jit
def _buckets(
    chosen, number, pairs, first, experts, stride, choice_stride,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Return (numbers of a block of pairs, the bucket of each, which bucket it is [BLOCK, BUCKETS]).

    Buckets are the rank's experts, then all others; a number that is no pair's is in none.
    """
    pair = number * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    place = chosen + (pair // CHOICES).to(tl.int64) * stride + pair % CHOICES * choice_stride
    expert = (tl.load(place, mask=inside, other=0) - first).to(tl.int32)
    bucket = tl.where((expert >= 0) & (expert < experts), expert, experts)
    bucket = tl.where(inside, bucket, BUCKETS)
    return pair, bucket, bucket[:, None] == tl.arange(0, BUCKETS)[None, :]


@triton.jit
def count_kernel(
    chosen, counts, pairs, first, experts, stride, choice_stride, blocks,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Compute counts [programs, BUCKETS]: the pairs of each bucket among the `blocks` blocks of each program."""
    total = tl.zeros((BUCKETS,), tl.int32)
    for number in range(tl.program_id(0) * blocks, (tl.program_id(0) + 1) * blocks):
        _, _, belongs = _buckets(chosen, number, pairs, first, experts, stride, choice_stride, CHOICES, BLOCK, BUCKETS)
        total += tl.sum(belongs.to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS), total)


@triton.jit
def order_kernel(
    chosen, counts, pair_out, expert_out, bounds, places, own, pairs, first, experts, stride, choice_stride, blocks,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr, BUCKETS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the rows of pairs sorted by bucket, those of one bucket in order; after count_kernel of as many programs.

    pair_out and expert_out of each row, bounds [experts], places and own of each pair: see megalora.ops.routing.Routes.
    """
    mine, buckets = tl.program_id(0), tl.arange(0, BUCKETS)
    total, before = tl.zeros((BUCKETS,), tl.int32), tl.zeros((BUCKETS,), tl.int32)
    for start in range(0, tl.num_programs(0), ROWS):
        program = start + tl.arange(0, ROWS)[:, None]
        found = tl.load(counts + program * BUCKETS + buckets[None, :], mask=program < tl.num_programs(0), other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where(program < mine, found, 0), 0)
    ends = tl.cumsum(total, 0)
    if mine == 0:
        tl.store(bounds + buckets, ends, mask=buckets < experts)
    begin = ends - total + before  # the row of each bucket's next pair
    index = tl.arange(0, BLOCK)
    for number in range(mine * blocks, (mine + 1) * blocks):
        pair, bucket, belongs = _buckets(
            chosen, number, pairs, first, experts, stride, choice_stride, CHOICES, BLOCK, BUCKETS
        )
        earlier = (bucket[:, None] == bucket[None, :]) & (index[None, :] < index[:, None])
        row = tl.sum(tl.where(belongs, begin[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        inside, held = pair < pairs, bucket < experts
        tl.store(pair_out + row, pair.to(tl.int64), mask=inside)
        tl.store(expert_out + row, bucket.to(tl.int64), mask=inside)
        tl.store(places + pair, tl.where(held, row, 0).to(tl.int64), mask=inside)
        tl.store(own + pair, held.to(tl.uint8), mask=inside)
        begin += tl.sum(belongs.to(tl.int32), 0)
