"""Launches of our own kernels for experts' products on Hopper: which products they take, in which tiles.

Legend as in megalora.ops.grouped: M rows, E matrices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from megalora.ops import limits
from megalora.ops.extension import has_triton

_OLDEST_TRITON = 3, 6
MOST_THIN = 128  # columns that one program of the thin kernel makes
_COLUMNS, _CONTRACTED, _STAGES = 256, 64, 4  # of the wide kernel's tiles
_REGISTERS = 168  # of a thread: three groups of 128 threads share 65536
# Columns and stages of `branch_`, for up to 16, 32 and 64 ranks: the fastest of a Qwen3-30B-A3B's down, and of its gate
# and up; what registers hold.
_BRANCH = (128, 3), (256, 2), (128, 2)
_THIN_ROWS, _THIN_CONTRACTED, _THIN_STAGES = 64, 64, 6
_TAKEN_CONTRACTED, _GATED_CONTRACTED = 128, 64  # of rows that lie at tokens, 256 bytes of each at a time; of two halves


class BranchGrad(NamedTuple):
    """A gradient of all experts' B, [E, O_i, R_i] of any dtype, to which scale dy_e^T z_e is added.

    rows     which features of dy its O_i are
    columns  which of z its R_i are
    """

    out: torch.Tensor
    rows: slice
    columns: slice
    scale: float


def takes(*tensors: torch.Tensor) -> bool:
    """Return whether the kernels take operands like these: bfloat16 on Hopper, rows that start on 16 bytes. In training
    alone: prompts of generation do not wait for Triton's compiler.
    """
    return (
        not torch.is_inference_mode_enabled()
        and all(
            t.dtype == torch.bfloat16
            and t.device.type == "cuda"
            and t.stride(-1) == 1
            and t.data_ptr() % limits.ALIGNMENT == 0
            and all(stride % limits.OCTET == 0 for stride in t.stride()[:-1])
            for t in tensors
        )
        and is_hopper(tensors[0].device)
    )


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Return whether the device has Hopper's instructions, and a Triton whose Gluon has them is there."""
    if torch.cuda.get_device_capability(device) != (9, 0) or not has_triton():
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= _OLDEST_TRITON


def product_(
    out: torch.Tensor,
    X: torch.Tensor,
    P: torch.Tensor,
    bounds: torch.Tensor,
    turned: bool,
    Z: torch.Tensor | None = None,
    A: torch.Tensor | None = None,
) -> None:
    """Write X P_e + Z A_e into out [M, N or more], turned: X P_e^T; columns of out that P has not are 0.

    X [M, K], P [E, K, N] (turned: [E, N, K]), Z [M, R], A [E, R, N]. Rows of no expert are left as they are.
    """
    if X.shape[0] == 0:
        return
    if out.shape[1] <= MOST_THIN and Z is None:
        _thin_(out, X, P, bounds, turned)
    else:
        _wide_(out, X, P, bounds, turned, Z, A)


def _thin_(out: torch.Tensor, X: torch.Tensor, P: torch.Tensor, bounds: torch.Tensor, turned: bool) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from megalora.ops.grouped_kernels import thin_kernel

    experts, columns = P.shape[0], _power(P.shape[1] if turned else P.shape[2], 16)
    block = [1, columns, _THIN_CONTRACTED] if turned else [1, _THIN_CONTRACTED, columns]
    thin_kernel[(X.shape[0] // _THIN_ROWS + experts,)](
        TensorDescriptor(X, list(X.shape), list(X.stride()), [_THIN_ROWS, _THIN_CONTRACTED]),
        TensorDescriptor(P, list(P.shape), list(P.stride()), block),
        out, out.stride(0), bounds, experts, out.shape[1], X.shape[1],
        TURNED=turned, EXPERTS=_power(experts, 2), M=_THIN_ROWS, N=columns, K=_THIN_CONTRACTED,
        num_warps=4, num_stages=_THIN_STAGES,
    )  # fmt: skip


def dispatch_thin(
    x: torch.Tensor, pair: torch.Tensor, choices: int, P: torch.Tensor, bounds: torch.Tensor, room: int
) -> torch.Tensor:
    """Return [X | X P_e^T | 0] [M, I + room], X [M, I] the rows of x [F, I] at tokens pair // choices; P [E, R, I].

    pair [M] int64. Rows of no expert are undefined.
    """
    from megalora.ops.grouped_kernels import dispatch_thin_kernel

    (experts, ranks, size), rows = P.shape, pair.shape[0]
    out = x.new_empty(rows, size + room)
    if rows:
        dispatch_thin_kernel[(rows // _THIN_ROWS + experts,)](
            x, pair, P, out, bounds, experts, size, ranks, room, x.stride(0), P.stride(0), P.stride(1), out.stride(0),
            CHOICES=choices, EXPERTS=_power(experts, 2), M=_THIN_ROWS, N=_power(ranks, 16), K=_TAKEN_CONTRACTED,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def gate_thin(
    gate_up: torch.Tensor,
    weights: torch.Tensor,
    pair: torch.Tensor,
    P: torch.Tensor,
    bounds: torch.Tensor,
    room: int,
) -> torch.Tensor:
    """Return [X | X P_e^T | 0] [M, I + room], X = w silu(gate) up [M, I]: gate_up [M, 2 I] contiguous, the weights of
    all pairs, pair [M] int64, P [E, R, I]. Rows of no expert are undefined.
    """
    from megalora.ops.grouped_kernels import gate_thin_kernel

    (experts, ranks, size), rows = P.shape, gate_up.shape[0]
    out = gate_up.new_empty(rows, size + room)
    if rows:
        gate_thin_kernel[(rows // _THIN_ROWS + experts,)](
            gate_up, weights, pair, P, out, bounds, experts, size, ranks, room, P.stride(0), P.stride(1), out.stride(0),
            EXPERTS=_power(experts, 2), M=_THIN_ROWS, N=_power(ranks, 64), K=_GATED_CONTRACTED,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def _wide_(
    out: torch.Tensor,
    X: torch.Tensor,
    P: torch.Tensor,
    bounds: torch.Tensor,
    turned: bool,
    Z: torch.Tensor | None,
    A: torch.Tensor | None,
) -> None:
    from megalora.ops.grouped_hopper import H, wide_kernel

    experts, rows, columns, contracted = P.shape[0], int(H), _COLUMNS, _CONTRACTED
    processors = torch.cuda.get_device_properties(X.device).multi_processor_count
    wide_kernel[(processors,)](
        _described(X, rows, contracted),
        _described(P, 1, columns, contracted) if turned else _described(P, 1, contracted, columns),
        None if Z is None else _described(Z, rows, contracted),
        None if A is None else _described(A, 1, contracted, columns),
        out, out.stride(0), bounds, bounds.new_zeros(1), experts, out.shape[1], X.shape[1],
        0 if Z is None else Z.shape[1],
        TURNED=turned, EXTRA=Z is not None, EXPERTS=_power(experts, 128), N=columns, K=contracted,
        STAGES=_STAGES, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip


def _described(tensor: torch.Tensor, *block: int) -> Any:
    """Return what the wide kernel copies blocks of `tensor` by."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)


def adds_to(outs: list[torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether `outer_` adds to `outs`."""
    each_whole = all(out.stride(2) == 1 and out.stride(1) == out.shape[2] for out in outs)
    return each_whole and (len(outs) == 1 or (len(outs) == 2 and a.shape[1] <= b.shape[1]))


def outer_(
    outs: list[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    pair: torch.Tensor | None = None,
    choices: int = 0,
) -> None:
    """Add scale a_e^T b_e to outs: one [E, N, K], or where a has the fewer columns two, the first of which has the
    first of its columns. a [M, N], b [M, K]; with pair [M] int64 b [F, K], whose rows are those of tokens
    pair // choices: then a has the fewer columns.
    """
    from megalora.ops.grouped_kernels import outer_kernel

    short_first = a.shape[1] <= b.shape[1]
    assert short_first or pair is None
    short, long = (a, b) if short_first else (b, a)
    out, second = outs[0], outs[-1]
    edge = out.shape[1] if short_first else short.shape[1]
    R, N = min(64, _power(short.shape[1], 16)), 64
    outer_kernel[(-(-long.shape[1] // N), -(-short.shape[1] // R), len(bounds))](
        short, long, pair, out, second, edge, scale, bounds, short.stride(0), long.stride(0), out.stride(0),
        second.stride(0), short.shape[1], long.shape[1],
        SHORT_FIRST=short_first, SECOND=len(outs) == 2, CHOICES=0 if pair is None else choices,
        R=R, N=N, K=64, num_warps=4, num_stages=4,
    )  # fmt: skip


def joins(grads: Sequence[BranchGrad], z: torch.Tensor) -> bool:
    """Return whether `branch_` makes these gradients: of one or two parts, which divide the columns of dy and z."""
    one_after_another = all(
        first.rows.stop == second.rows.start and first.columns.stop == second.columns.start
        for first, second in itertools.pairwise(grads)
    )
    return (
        1 <= len(grads) <= 2
        and one_after_another
        and z.shape[1] <= MOST_THIN // 2
        and all(g.out.stride(2) == 1 and g.out.stride(1) == g.out.shape[2] for g in grads)
    )


def branch_(
    grads: Sequence[BranchGrad],
    dy: torch.Tensor,
    z: torch.Tensor,
    B: torch.Tensor,
    bounds: torch.Tensor,
    pair: torch.Tensor | None = None,
    choices: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dy [M, O], dy B_e [M, R]), and add the outer products of `grads`: megalora.ops.grouped.grouped_branch_.

    dy [M, O], which is returned; with pair [M] int64 dy [F, O], whose rows are those of tokens pair // choices.
    """
    from megalora.ops.grouped_kernels import branch_kernel, sum_kernel

    (rows, ranks), width, first, second = z.shape, dy.shape[1], grads[0], grads[-1]
    tiles, R = branch_tiles(width, ranks)
    dz, taken = z.new_empty(rows, R)[:, :ranks], dy if pair is None else dy.new_empty(rows, width)
    N, stages = _branch_tile(R)
    parts = torch.empty(tiles, rows, R, dtype=torch.float32, device=dy.device)
    branch_kernel[(tiles, len(bounds))](
        dy, pair, taken, z, B, parts, first.out, second.out, first.scale, second.scale, bounds, dy.stride(0),
        taken.stride(0), z.stride(0), B.stride(0), B.stride(1), rows * R, first.out.stride(0), second.out.stride(0),
        first.out.shape[1], first.out.shape[2], width, ranks,
        SECOND=len(grads) == 2, CHOICES=0 if pair is None else choices, R=R, N=N, K=64, num_warps=4, num_stages=stages,
    )  # fmt: skip
    if rows:
        M = 64
        sum_kernel[(-(-rows // M),)](parts, dz, rows * R, R, rows, ranks, COUNT=tiles, R=R, M=M, num_warps=4)
    return taken, dz


def branch_tiles(width: int, ranks: int) -> tuple[int, int]:
    """Return (tiles of columns of dy, columns of each one's part of dz) of `branch_`: dz lies [tiles, M, columns] in
    float32 before it is summed.
    """
    columns = _power(ranks, 16)
    return -(-width // _branch_tile(columns)[0]), columns


def _branch_tile(R: int) -> tuple[int, int]:
    """Return (columns of dy of a tile, stages)."""
    return _BRANCH[(R > 16) + (R > 32)]


def _power(n: int, least: int) -> int:
    """Return the power of two from `least` on that holds n."""
    return max(least, 1 << (n - 1).bit_length())
