"""Triton kernels of experts: the gate with the weights of pairs in it, forward and backward, and the sum over a token's
pairs. One pass over memory each, where torch takes four to six.

Only a GPU's path imports this module (megalora.ops.routing, megalora.ops.weighted_gate). `count` holds how many rows
belong to experts of the rank: those behind are passed over, and hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dispatch_kernel(x, pair, count, out, size, x_stride, out_stride, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out[row, :size] = x[token of the row, :size]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < size) & (row < tl.load(count))
    token = tl.load(pair + row) // CHOICES
    tl.store(out + row * out_stride + columns, tl.load(x + token * x_stride + columns, mask=inside), mask=inside)


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
def gate_backward_kernel(dh, gate_up, weights, pair, count, grad, dweights, size, dh_stride, BLOCK: tl.constexpr):
    """Compute grad = that of gate_up where weights * silu(gate) * up has dh; dweights[row] = the sum of dh silu(gate)
    up.
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
