"""Triton kernels of the short convolution with SiLU (megalora.ops.short_convolution), which read the channels of some
heads where they lie: those of q, of k and of v are a run of blocks each.

Only a GPU's path imports this module (megalora.ops.fused_delta).

x [tokens, 8 x_octets] has the channels of `weight` [C, WIDTH] in front; q_at, k_at, v_at are blocks of BLOCK of these,
and `keys` how many there are of q, and of k. A tile is [ROWS, BLOCK].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _source(q_at, k_at, v_at, keys, BLOCK: tl.constexpr):
    """Return the channel at which the program's block begins in x."""
    block = tl.program_id(1)
    of_others = tl.where(block < 2 * keys, k_at + block - keys, v_at + block - 2 * keys)
    return tl.where(block < keys, q_at + block, of_others) * BLOCK


@triton.jit
def _convolved(x, weight, token, age, inside, channel, x_octets, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return y [ROWS, BLOCK] float32 of the tokens [ROWS], before SiLU."""
    columns = channel + tl.arange(0, BLOCK)
    base = x + token.to(tl.int64)[:, None] * (x_octets * 8) + columns[None, :]
    y = tl.zeros((token.shape[0], BLOCK), tl.float32)
    for j in tl.static_range(WIDTH):
        tap = tl.load(weight + columns * WIDTH + (WIDTH - 1 - j)).to(tl.float32)
        reached = (inside & (age >= j))[:, None]
        y += tap[None, :] * tl.load(base - j * (x_octets * 8), mask=reached, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["tokens", "x_octets", "q_at", "k_at", "v_at", "keys"])
def convolution_kernel(
    x, weight, ages, out, tokens, x_octets, q_at, k_at, v_at, keys, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute out [tokens, channels of the blocks] = silu(y). Programs: rows, blocks."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    age = tl.load(ages + token, mask=inside, other=0)
    y = _convolved(x, weight, token, age, inside, _source(q_at, k_at, v_at, keys, BLOCK), x_octets, WIDTH, BLOCK)
    at = token.to(tl.int64)[:, None] * stride + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + at, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "x_octets", "dx_octets", "q_at", "k_at", "v_at", "keys"])
def convolution_backward_kernel(
    x, weight, ages, dout, dx, tokens, x_octets, dx_octets, q_at, k_at, v_at, keys, stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of x, into the channels that convolution_kernel reads, from dout as `out`. Programs: as
    there.

    y is computed again for each of the WIDTH tokens that read one: to keep it would take more memory traffic.
    """
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = _source(q_at, k_at, v_at, keys, BLOCK)
    columns = channel + tl.arange(0, BLOCK)
    found = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in tl.static_range(WIDTH):
        token = own + j
        inside = token < tokens
        age = tl.load(ages + token, mask=inside, other=0)
        inside = inside & (age >= j)  # else it is of another document
        y = _convolved(x, weight, token, age, inside, channel, x_octets, WIDTH, BLOCK)
        at = token.to(tl.int64)[:, None] * stride + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        grad = tl.load(dout + at, mask=inside[:, None], other=0.0).to(tl.float32)
        opened = tl.sigmoid(y)
        tap = tl.load(weight + columns * WIDTH + (WIDTH - 1 - j)).to(tl.float32)
        found += tap[None, :] * grad * opened * (1.0 + y * (1.0 - opened))
    at = own.to(tl.int64)[:, None] * (dx_octets * 8) + columns[None, :]
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=(own < tokens)[:, None])
