"""Triton kernels of experts' adapters: X P_e^T and X P_e of few columns, a_e^T b_e, and the last two of one long
operand, with bounds on the device.

They read their long operand once and do little with it. Tiles of rows are numbered so that nothing has to be summed
up: expert e takes the numbers from start_e // M + e on, which leaves it at least the tiles that its rows need. Programs
whose number no rows stand behind end at once.

The long operand may lie at the tokens: row m is then that of token pair[m] // CHOICES.

Only a GPU's path imports this module (megalora.ops.grouped_gpu). Sums run in one order: a row's result depends on that
row and on its expert's matrix alone, an expert's on its own rows.

Legend: M rows and N columns of a tile, K of the contracted dimension at a time, R columns of the short operand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(bounds, number, experts, EXPERTS: tl.constexpr, M: tl.constexpr):
    """Return (expert, first row, end of its expert's rows) of tile `number`; of one without rows, first >= end."""
    expert = tl.arange(0, EXPERTS)
    starts = tl.load(bounds + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
    mine = tl.sum(((starts // M + expert <= number) & (expert < experts)).to(tl.int32), 0) - 1
    start = tl.load(bounds + mine - 1, mask=mine > 0, other=0)
    return mine, start + (number - start // M - mine) * M, tl.load(bounds + mine)


@triton.jit
def _source(pair, first, stop, CHOICES: tl.constexpr, K: tl.constexpr):
    """Return where rows [first, first + K) of the long operand lie, [K, 1] int64: theirs, or with CHOICES their tokens.

    Asked for a step ahead of their use: then Triton copies the long operand ahead of its use too.
    """
    rows = first + tl.arange(0, K)
    if CHOICES:
        return (tl.load(pair + rows, mask=rows < stop, other=0) // CHOICES)[:, None]
    else:
        return rows.to(tl.int64)[:, None]


@triton.jit
def _store_thin(out, out_stride, total, row, stop, columns, M: tl.constexpr, N: tl.constexpr):
    """Write `total` [M, N] into the first columns of out, and 0 into the others."""
    rows, at = row + tl.arange(0, M), tl.arange(0, N)
    place = out + rows.to(tl.int64)[:, None] * out_stride + at[None, :]
    for start in range(0, columns, N):
        mask = (rows < stop)[:, None] & (start + at < columns)[None, :]
        tl.store(place + start, total.to(out.dtype.element_ty), mask=mask)
        total = tl.zeros((M, N), tl.float32)


@triton.jit
def thin_kernel(
    x, p, out, out_stride, bounds, experts, columns, contracted,
    TURNED: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute out [rows, columns] = X P_e, TURNED: X P_e^T, of the rows of each expert; others are left as they are.

    x [rows, contracted] and p [experts, contracted, at most N], TURNED: [experts, at most N, contracted], are
    descriptors of tiles [M, K] and [1, K, N] or [1, N, K]; columns of out that p has not are 0. One program makes all.
    """
    expert, row, stop = _place(bounds, tl.program_id(0), experts, EXPERTS, M)
    if row < stop:
        total = tl.zeros((M, N), tl.float32)
        for k in range(0, contracted, K):
            left = x.load([row, k])
            if TURNED:
                total = tl.dot(left, p.load([expert, 0, k]).reshape(N, K).T, total)
            else:
                total = tl.dot(left, p.load([expert, k, 0]).reshape(K, N), total)
        _store_thin(out, out_stride, total, row, stop, columns, M, N)


@triton.jit
def dispatch_thin_kernel(
    x, pair, p, out, bounds, experts, size, ranks, columns, x_stride, p_stride, p_row, out_stride,
    CHOICES: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute out[row, :size] = X, which lies at the tokens, and the `columns` behind it = X P_e^T, 0 where p has none.

    x [tokens, size], p [experts, ranks, size] with p_stride between experts, ranks at most N.
    """
    expert, row, stop = _place(bounds, tl.program_id(0), experts, EXPERTS, M)
    if row < stop:
        rows, at, k = row + tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
        own, held = (rows < stop)[:, None], (at < ranks)[:, None]
        token = tl.load(pair + rows, mask=rows < stop, other=0) // CHOICES
        source = x + token[:, None] * x_stride + k[None, :]
        to = out + rows.to(tl.int64)[:, None] * out_stride + k[None, :]
        right = p + expert.to(tl.int64) * p_stride + at[:, None] * p_row + k[None, :]
        total = tl.zeros((M, N), tl.float32)
        for start in range(0, size, K):
            inside = (start + k < size)[None, :]
            left = tl.load(source + start, mask=own & inside, other=0.0)
            total = tl.dot(left, tl.load(right + start, mask=held & inside, other=0.0).T, total)
            tl.store(to + start, left, mask=own & inside)
        _store_thin(out + size, out_stride, total, row, stop, columns, M, N)


@triton.jit
def gate_thin_kernel(
    gate_up, weights, pair, p, out, bounds, experts, size, ranks, columns, p_stride, p_row, out_stride,
    EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute out[row, :size] = X = weights[pair[row]] silu(gate) up, and the `columns` behind it = X P_e^T, 0 where p
    has none.

    gate_up [rows, 2 size] contiguous, p as of dispatch_thin_kernel; N at least 64.
    """
    expert, row, stop = _place(bounds, tl.program_id(0), experts, EXPERTS, M)
    if row < stop:
        rows, at, k = row + tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
        own, held = (rows < stop)[:, None], (at < ranks)[:, None]
        weight = tl.load(weights + tl.load(pair + rows, mask=rows < stop, other=0))[:, None]
        source = gate_up + rows.to(tl.int64)[:, None] * (2 * size) + k[None, :]
        to = out + rows.to(tl.int64)[:, None] * out_stride + k[None, :]
        right = p + expert.to(tl.int64) * p_stride + at[:, None] * p_row + k[None, :]
        # Turned: so what was made goes to shared memory. With it in registers and 32 columns ptxas 12.8 takes the other
        # operand's descriptor from a uniform register that nothing wrote (seen in SASS, as in fused_delta).
        total = tl.zeros((N, M), tl.float32)
        for start in range(0, size, K):
            inside = (start + k < size)[None, :]
            factor = tl.load(right + start, mask=held & inside, other=0.0)
            gate = tl.load(source + start, mask=own & inside, other=0.0).to(tl.float32)
            up = tl.load(source + start + size, mask=own & inside, other=0.0).to(tl.float32)
            made = (gate * tl.sigmoid(gate) * up * weight).to(out.dtype.element_ty)
            total = tl.dot(factor, made.T, total)
            tl.store(to + start, made, mask=own & inside)
        _store_thin(out + size, out_stride, total.T, row, stop, columns, M, N)


@triton.jit
def outer_kernel(
    a, b, pair, out, second, edge, scale, bounds, a_stride, b_stride, out_stride, second_stride, short, long,
    SHORT_FIRST: tl.constexpr, SECOND: tl.constexpr, CHOICES: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Add scale a_e^T b_e to out_e [short, long] of each expert e, not SHORT_FIRST: scale b_e^T a_e to [long, short].

    a [rows, short], b [rows, long], CHOICES: at the tokens. out_stride lies between experts, each of them contiguous.
    SECOND, for SHORT_FIRST: columns of a from `edge` on belong to second_e [short - edge, long], and out_e is
    [edge, long].
    """
    expert = tl.program_id(2)
    columns, ranks = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * R + tl.arange(0, R)
    start = tl.load(bounds + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(bounds + expert)
    inside, within = (columns < long)[None, :], (ranks < short)[None, :]
    total = tl.zeros((N, R), tl.float32)
    source = _source(pair, start, stop, CHOICES, K)
    for first in range(start, stop, K):
        rows = (first + tl.arange(0, K))[:, None]
        own = rows < stop
        left = tl.load(a + rows.to(tl.int64) * a_stride + ranks[None, :], mask=own & within, other=0.0)
        right = tl.load(b + source * b_stride + columns[None, :], mask=own & inside, other=0.0)
        source = _source(pair, first + K, stop, CHOICES, K)
        total = tl.dot(tl.trans(right), left, total)
    total *= scale
    to = out + expert.to(tl.int64) * out_stride
    if SHORT_FIRST:
        total, rank, column = tl.trans(total), ranks[:, None], columns[None, :]
        place = to + rank * long + column
    else:
        rank, column = ranks[None, :], columns[:, None]
        place = to + column * short + rank
    mask = (column < long) & (rank < edge) & (start < stop)
    tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)
    if SECOND:
        place = second + expert.to(tl.int64) * second_stride + (rank - edge) * long + column
        mask = (column < long) & (rank >= edge) & (rank < short) & (start < stop)
        tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def branch_kernel(
    dy, pair, taken, z, branch, parts, out, second, scale, second_scale, bounds, dy_stride, taken_stride, z_stride,
    branch_stride, branch_row, parts_stride, out_stride, second_stride, out_rows, out_ranks, width, ranks,
    SECOND: tl.constexpr, CHOICES: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write dy B_e of N columns of dy and an expert e into parts [rows, R], and add scale dy_e^T z_e of them.

    dy [rows, width], CHOICES: at the tokens, and written to taken [rows, width]; z [rows, ranks], branch [experts,
    width, ranks]. parts_stride lies between the parts of tiles of columns. The outer product goes to out_e [out_rows,
    out_ranks], SECOND: with its first rows and ranks, the others to second_e [width - out_rows, ranks - out_ranks] by
    second_scale; between experts out_stride, each contiguous.
    """
    expert = tl.program_id(1)
    columns, at = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, R)
    start = tl.load(bounds + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(bounds + expert)
    inside, held = columns < width, at < ranks
    place = branch + expert.to(tl.int64) * branch_stride + columns[:, None] * branch_row + at[None, :]
    right = tl.load(place, mask=inside[:, None] & held[None, :], other=0.0)
    parts += tl.program_id(0).to(tl.int64) * parts_stride
    total = tl.zeros((N, R), tl.float32)
    source = _source(pair, start, stop, CHOICES, K)
    for first in range(start, stop, K):
        rows = (first + tl.arange(0, K))[:, None]
        own, far = rows < stop, rows.to(tl.int64)
        left = tl.load(dy + source * dy_stride + columns[None, :], mask=own & inside[None, :], other=0.0)
        source = _source(pair, first + K, stop, CHOICES, K)
        down = tl.load(z + far * z_stride + at[None, :], mask=own & held[None, :], other=0.0)
        total = tl.dot(tl.trans(left), down, total)
        tl.store(parts + far * R + at[None, :], tl.dot(left, right), mask=own)
        if CHOICES:
            tl.store(taken + far * taken_stride + columns[None, :], left, mask=own & inside[None, :])
    some = start < stop
    column, rank = columns[:, None], at[None, :]
    mask = some & (column < out_rows) & (rank < out_ranks)
    place = out + expert.to(tl.int64) * out_stride + column * out_ranks + rank
    tl.store(place, tl.load(place, mask=mask, other=0.0) + total * scale, mask=mask)
    if SECOND:
        mask = some & (column >= out_rows) & (column < width) & (rank >= out_ranks) & (rank < ranks)
        place = second + expert.to(tl.int64) * second_stride
        place += (column - out_rows) * (ranks - out_ranks) + rank - out_ranks
        tl.store(place, tl.load(place, mask=mask, other=0.0) + total * second_scale, mask=mask)


@triton.jit
def sum_kernel(
    parts, out, parts_stride, out_stride, rows, ranks, COUNT: tl.constexpr, R: tl.constexpr, M: tl.constexpr
):
    """Write the sum of COUNT parts [rows, R], in their order, to out [rows, ranks]."""
    row, at = tl.program_id(0) * M + tl.arange(0, M)[:, None], tl.arange(0, R)[None, :]
    total = tl.zeros((M, R), tl.float32)
    for _ in tl.static_range(COUNT):  # all loads under way at once
        total += tl.load(parts + row * R + at, mask=row < rows, other=0.0)
        parts += parts_stride
    tl.store(out + row * out_stride + at, total.to(out.dtype.element_ty), mask=(row < rows) & (at < ranks))
