"""Experts' products on Hopper, in Gluon (Triton's lower floor): X P_e^T, X P_e and X P_e + Z A_e.

One program a multiprocessor. One warp of it loads (TMA), two groups of four multiply (wgmma), one of them while the
other writes its results. Items of work are handed out as programs ask for them: a tile of 128 rows and N columns, a
group of warps 64 rows each. What is left of an expert's rows, up to 64, goes along as a third block with the last
tile, each group taking half of its columns, so that P_e is not read again for it and few rows are computed for
nothing.

Sums over the contracted dimension run in one order, whatever the tile: a row's result depends on that row and on its
expert's matrix alone. Only megalora.ops.grouped imports this module, for triton comes with torch for GPUs alone.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

H = gl.constexpr(64)  # rows of a block: what one instruction of a warp group multiplies
_TURNS = gl.constexpr(4)  # items that may be on their way from the warp that loads to those that multiply


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _schedule(bounds, experts, across, EXPERTS: gl.constexpr):
    """Return (the number of each expert's first item [EXPERTS], items of all)."""
    kept: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, EXPERTS // 32], [1, 32], [gl.num_warps(), 1], [1, 0]))
    layout: gl.constexpr = gl.BlockedLayout([EXPERTS // (32 * gl.num_warps())], [32], [gl.num_warps()], [0])
    expert = gl.arange(0, EXPERTS, layout)
    held = expert < experts
    stop = gl.load(bounds + expert, mask=held, other=0)
    start = gl.load(bounds + expert - 1, mask=held & (expert > 0), other=0)
    blocks = gl.where(held, (stop - start + H - 1) // H, 0)
    items = (blocks // 2 + (blocks == 1).to(gl.int32)) * across
    ends = gl.associative_scan(items, 0, _add)
    return gl.convert_layout(ends - items, kept), gl.sum(items, 0)


@gluon.jit
def _find(firsts, bounds, experts, item, across, EXPERTS: gl.constexpr):
    """Return (expert, first row, end of its expert's rows, number of the tile of columns, blocks of rows)."""
    layout: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, EXPERTS // 32], [1, 32], [gl.num_warps(), 1], [1, 0]))
    index = gl.arange(0, EXPERTS, layout)
    before = (firsts <= item) & (index < experts)
    expert = gl.sum(before.to(gl.int32), 0) - 1
    within = item - gl.max(gl.where(before, firsts, 0), 0)
    stop = gl.load(bounds + expert)
    start = gl.load(bounds + expert - 1, mask=expert > 0, other=0)
    row = start + within // across * 2 * H
    blocks = (stop - row + H - 1) // H
    height = gl.where(blocks > 3, 2, blocks)  # the last of several tiles takes a third block along
    return expert, row, stop, within % across, height


@gluon.jit
def _hand_out(ring, turn, row, stop, tile, height):
    """Give an item to the warps that multiply; one of no height ends their work."""
    items, taken, given = ring
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    at = gl.arange(0, 4, layout)
    item = gl.where(at == 0, row, gl.where(at == 1, stop, gl.where(at == 2, tile, height)))
    slot = turn % _TURNS
    mbarrier.wait(taken.index(slot), ((turn // _TURNS) & 1) ^ 1)
    items.index(slot).store(item)
    gl.thread_barrier()
    mbarrier.arrive(given.index(slot), count=1)


@gluon.jit
def _take(ring, turn):
    """Return (first row, end of its expert's rows, tile of columns, blocks of rows) of the next item."""
    items, taken, given = ring
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    slot = turn % _TURNS
    mbarrier.wait(given.index(slot), (turn // _TURNS) & 1)
    item = items.index(slot).load(layout)
    gl.thread_barrier()
    mbarrier.arrive(taken.index(slot), count=1)
    at = gl.arange(0, 4, layout)
    row, stop = gl.sum(gl.where(at == 0, item, 0), 0), gl.sum(gl.where(at == 1, item, 0), 0)
    return row, stop, gl.sum(gl.where(at == 2, item, 0), 0), gl.sum(gl.where(at == 3, item, 0), 0)


@gluon.jit
def _load_rows(x, row, k, height, arrived, blocks, first):
    """Load `height` blocks of rows; an odd one goes behind the places of the two others."""
    if height > 1:
        tma.async_copy_global_to_shared(x, [row, k], arrived, blocks.index(first))
        tma.async_copy_global_to_shared(x, [row + H, k], arrived, blocks.index(first + 1))
    if height != 2:
        tma.async_copy_global_to_shared(x, [row + (height - 1) * H, k], arrived, blocks.index(first + 2))


@gluon.jit
def _produce(
    descriptors, bounds, counter, experts, columns, contracted, steps, pipe, ring,
    TURNED: gl.constexpr, EXTRA: gl.constexpr, EXPERTS: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Load the operands of each item, step by step, as far ahead as there are stages."""
    x, p, z, a = descriptors
    x_blocks, p_tiles, ready, empty = pipe
    across = gl.cdiv(columns, N)
    firsts, items = _schedule(bounds, experts, across, EXPERTS)
    count, turn, item = 0, 0, gl.program_id(0)
    while item < items:
        expert, row, stop, tile, height = _find(firsts, bounds, experts, item, across, EXPERTS)
        _hand_out(ring, turn, row, stop, tile, height)
        for step in range(steps):
            index = count % STAGES
            arrived, right = ready.index(index), p_tiles.index(index)
            mbarrier.wait(empty.index(index), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(arrived, (H + N) * K * 2, height == 1)
            mbarrier.expect(arrived, (2 * H + N) * K * 2, height == 2)
            mbarrier.expect(arrived, (3 * H + N) * K * 2, height == 3)
            if EXTRA and step * K >= contracted:
                k = step * K - gl.cdiv(contracted, K) * K
                _load_rows(z, row, k, height, arrived, x_blocks, index * 3)
                tma.async_copy_global_to_shared(a, [expert, k, tile * N], arrived, right)
            else:
                k = step * K
                _load_rows(x, row, k, height, arrived, x_blocks, index * 3)
                if TURNED:
                    tma.async_copy_global_to_shared(p, [expert, tile * N, k], arrived, right)
                else:
                    tma.async_copy_global_to_shared(p, [expert, k, tile * N], arrived, right)
            count += 1
        turn += 1
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
    _hand_out(ring, turn, 0, 0, 0, 0)


@gluon.jit
def _next(ready, count, STAGES: gl.constexpr):
    """Wait for the operands of a step; return the index of their buffers."""
    mbarrier.wait(ready.index(count % STAGES), (count // STAGES) & 1)
    return count % STAGES


@gluon.jit
def _give_back(empty, count, done, STAGES: gl.constexpr):
    """Let the buffers of step `count` be written again, if it is `done`."""
    gl.thread_barrier()
    mbarrier.arrive(empty.index((count + STAGES) % STAGES), count=1, pred=done)


@gluon.jit
def _right(p_tiles, index, WHO: gl.constexpr, TURNED: gl.constexpr, N: gl.constexpr, HALF: gl.constexpr):
    """Return the tile of P [K, N], HALF: half of its columns."""
    right = p_tiles.index(index)
    if HALF:
        right = right.slice(WHO * (N // 2), N // 2, 0 if TURNED else 1)
    if TURNED:
        right = right.permute((1, 0))
    return right


@gluon.jit
def _store(out, out_stride, total, row, stop, column, columns, N: gl.constexpr):
    """Write a block, four columns of a thread at a time, sixteen of four lanes: whole sectors of memory.

    Lanes swap what they hold by shuffles.
    """
    far: gl.constexpr = [[0, 32], [0, 64], [0, 128]] if N == 256 else [[0, 32], [0, 64]] if N == 128 else [[0, 32]]
    registers: gl.constexpr = [[0, 1], [0, 2], [8, 0], [0, 16]] + far
    lanes: gl.constexpr = [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]]
    layout: gl.constexpr = gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [H, N])
    rows = row + gl.arange(0, H, gl.SliceLayout(1, layout))
    at = column + gl.arange(0, N, gl.SliceLayout(0, layout))
    place = out + rows.to(gl.int64)[:, None] * out_stride + at[None, :]
    result = gl.convert_layout(total.to(out.dtype.element_ty), layout)
    gl.store(place, result, mask=(rows < stop)[:, None] & (at < columns)[None, :])


@gluon.jit
def _consume(
    out, out_stride, columns, steps, pipe, ring,
    WHO: gl.constexpr, TURNED: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply block WHO of an item's rows, and of an odd block half of the columns."""
    x_blocks, p_tiles, ready, empty = pipe
    HALF: gl.constexpr = N // 2
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    count, turn = 0, 0
    row, stop, tile, height = _take(ring, turn)
    while height > 0:
        total, third = gl.zeros((H, N), gl.float32, whole), gl.zeros((H, HALF), gl.float32, half)
        if height == 2:
            for step in range(steps):
                index = _next(ready, count, STAGES)
                right = _right(p_tiles, index, WHO, TURNED, N, False)
                total = warpgroup_mma(x_blocks.index(index * 3 + WHO), right, total, is_async=True)
                total = warpgroup_mma_wait(1, (total,))
                _give_back(empty, count - 1, step > 0, STAGES)
                count += 1
            total = warpgroup_mma_wait(0, (total,))
        elif height == 3:
            for step in range(steps):
                index = _next(ready, count, STAGES)
                right = _right(p_tiles, index, WHO, TURNED, N, False)
                total = warpgroup_mma(x_blocks.index(index * 3 + WHO), right, total, is_async=True)
                right_half = _right(p_tiles, index, WHO, TURNED, N, True)
                third = warpgroup_mma(x_blocks.index(index * 3 + 2), right_half, third, is_async=True)
                total, third = warpgroup_mma_wait(2, (total, third))
                _give_back(empty, count - 1, step > 0, STAGES)
                count += 1
            total, third = warpgroup_mma_wait(0, (total, third))
        else:
            for step in range(steps):
                index = _next(ready, count, STAGES)
                right_half = _right(p_tiles, index, WHO, TURNED, N, True)
                third = warpgroup_mma(x_blocks.index(index * 3 + 2), right_half, third, is_async=True)
                third = warpgroup_mma_wait(1, (third,))
                _give_back(empty, count - 1, step > 0, STAGES)
                count += 1
            third = warpgroup_mma_wait(0, (third,))
        _give_back(empty, count - 1, True, STAGES)
        if height > 1:
            _store(out, out_stride, total, row + WHO * H, stop, tile * N, columns, N)
        if height != 2:
            _store(out, out_stride, third, row + (height - 1) * H, stop, tile * N + WHO * HALF, columns, HALF)
        turn += 1
        row, stop, tile, height = _take(ring, turn)


@gluon.jit
def wide_kernel(
    x, p, z, a, out, out_stride, bounds, counter, experts, columns, contracted, rank,
    TURNED: gl.constexpr, EXTRA: gl.constexpr, EXPERTS: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute out = X P_e + Z A_e, TURNED: X P_e^T, of the rows of each expert; others are left as they are.

    x [rows, contracted], p [experts, contracted, columns] (TURNED: columns before contracted), z [rows, rank] and a
    [experts, rank, columns] are descriptors of blocks [H, K], [1, K, N] ([1, N, K]), [H, K] and [1, K, N]; EXTRA: there
    are z and a. counter [1] int32: 0, for the programs to share the items.
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_blocks = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 3, H, K], shared)
    p_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, N, K] if TURNED else [STAGES, K, N], shared)
    items = gl.allocate_shared_memory(gl.int32, [_TURNS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [_TURNS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [_TURNS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(_TURNS):
        mbarrier.init(given.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    steps = gl.cdiv(contracted, K)
    if EXTRA:
        steps += gl.cdiv(rank, K)
    pipe, ring = (x_blocks, p_tiles, ready, empty), (items, taken, given)
    loads = (x, p, z, a)
    # Registers of a thread: what the groups that multiply hold, and what is left for the one that loads.
    gl.warp_specialize(
        [
            (_consume, (out, out_stride, columns, steps, pipe, ring, 0, TURNED, N, STAGES)),
            (_consume, (out, out_stride, columns, steps, pipe, ring, 1, TURNED, N, STAGES)),
            (
                _produce,
                (
                    loads, bounds, counter, experts, columns, contracted, steps, pipe, ring,
                    TURNED, EXTRA, EXPERTS, N, K, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
