"""Tokens to the experts that they chose, and back: every token is taken, in a stable order, and none is dropped.

A pair is one choice of one token: pair t * k + j is the j-th choice of token t. The pairs of the experts of this rank
are sorted by expert, those of one expert by token; a row of what the experts read and write is one pair.

Legend: F tokens, k choices of each, E experts of this rank, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalora.ops.extension import has_triton
from megalora.ops.grouped import Bounds, runs_grouped

_HELD = 1 << 13  # numbers of pairs times buckets that a program of the order's kernels holds at once
_MOST_COUNTS = 128  # programs that count: each adds up the counts of all


@dataclass(frozen=True)
class Routes:
    """Where the rows of this rank's experts come from.

    pair    [M] int64, the pair of each row
    expert  [M] int64, its expert, counted from the first of this rank
    bounds  the end of each expert's rows (see megalora.ops.grouped)
    places  [F, k] int64, the row of each pair, and [F, k] bool, whether it is one of this rank's; None on a CPU
    """

    pair: torch.Tensor
    expert: torch.Tensor
    bounds: Bounds
    tokens: int
    choices: int
    places: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def count(self) -> torch.Tensor:
        """[] int32 on the device, how many rows are this rank's."""
        if isinstance(self.bounds, torch.Tensor):
            return self.bounds[-1]
        return torch.tensor(self.bounds[-1], dtype=torch.int32, device=self.pair.device)

    @property
    def token(self) -> torch.Tensor:
        """[M] int64, the token of each row."""
        return self.pair // self.choices


def route(chosen: torch.Tensor, first: int, stop: int, dtype: torch.dtype) -> Routes:
    """Return the Routes to experts [first, stop) of `chosen` [F, k] int64, experts whose rows are of `dtype`.

    On a GPU all F * k pairs are rows, those of other ranks' experts behind the last bound: how many there are stays on
    the device.
    """
    tokens, choices = chosen.shape
    if tokens and runs_grouped(chosen.device, dtype) and has_triton():
        return _ordered(chosen, first, stop)
    flat, count = chosen.flatten() - first, stop - first
    local = torch.where((flat >= 0) & (flat < count), flat, count)
    expert, pair = local.sort(stable=True)
    bounds = torch.searchsorted(expert, torch.arange(count, device=chosen.device), right=True)
    places = None
    if chosen.device.type == "cuda":  # where sums by index have no order
        place = torch.empty_like(pair)
        place[pair] = torch.arange(pair.shape[0], device=pair.device)
        own = local < count
        places = torch.where(own, place, 0).view_as(chosen), own.view_as(chosen)
    if runs_grouped(chosen.device, dtype):
        return Routes(pair, expert, bounds.int(), tokens, choices, places)
    ends = tuple(bounds.tolist())
    rows = ends[-1]
    return Routes(pair[:rows], expert[:rows], ends, tokens, choices, places)


def _ordered(chosen: torch.Tensor, first: int, stop: int) -> Routes:
    """Return the Routes by two kernels: the pairs of each expert are counted, then each finds its row."""
    from megalora.ops.routing_kernels import count_kernel, order_kernel

    (tokens, choices), count, device = chosen.shape, stop - first, chosen.device
    pairs, buckets = tokens * choices, 1 << count.bit_length()  # a power of two that holds one bucket more
    block = max(16, min(64, _HELD // buckets))
    programs = min(_MOST_COUNTS, -(-pairs // block))
    blocks = -(-pairs // (block * programs))
    counts = torch.empty(programs, buckets, dtype=torch.int32, device=device)
    pair, expert = (torch.empty(pairs, dtype=torch.int64, device=device) for _ in range(2))
    bounds = torch.empty(count, dtype=torch.int32, device=device)
    places = torch.empty_like(pair).view(tokens, choices)
    own = torch.empty(tokens, choices, dtype=torch.bool, device=device)
    numbers = pairs, first, count, *chosen.stride(), blocks
    shape = {"CHOICES": choices, "BLOCK": block, "BUCKETS": buckets, "num_warps": 8}
    count_kernel[(programs,)](chosen, counts, *numbers, **shape)
    order_kernel[(programs,)](
        chosen, counts, pair, expert, bounds, places, own.view(torch.uint8), *numbers, **shape,
        ROWS=max(1, _HELD // buckets),
    )  # fmt: skip
    return Routes(pair, expert, bounds, tokens, choices, (places, own))


def take(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return scores [F, k] of what each token chose: scores [F, E], chosen [F, k], each row of it without repeats."""
    return _Take.apply(scores, chosen)


class _Take(torch.autograd.Function):
    """gather; its own backward has no order of sums that is fixed on a GPU, and here there is nothing to sum."""

    @staticmethod
    def forward(ctx, scores, chosen):
        ctx.save_for_backward(chosen)
        ctx.count = scores.shape[1]
        return scores.gather(1, chosen)

    @staticmethod
    def backward(ctx, dy):
        (chosen,) = ctx.saved_tensors
        place = chosen + ctx.count * torch.arange(chosen.shape[0], device=chosen.device)[:, None]
        grad = dy.new_zeros(chosen.shape[0] * ctx.count)
        grad[place.flatten()] = dy.flatten()
        return grad.view(-1, ctx.count), None


def fuses(rows: torch.Tensor) -> bool:
    """Return whether Triton kernels take these rows: on a GPU, in 16 bits or float32, where Triton is installed."""
    return rows.device.type == "cuda" and rows.dtype != torch.float64 and has_triton()


def dispatch(x: torch.Tensor, routes: Routes, size: int, room: int = 0) -> torch.Tensor:
    """Return the token of each row of x [F, size or more] with room behind it, [M, size + room], undefined in the room.

    Not for autograd.
    """
    if fuses(x) and x.stride(1) == 1:
        from megalora.ops.routing_kernels import dispatch_kernel

        assert routes.places is not None
        (places, own), block = routes.places, 1024
        out = x.new_empty(routes.pair.shape[0], size + room)
        if len(out):
            launch, strides = dispatch_kernel[routes.tokens, -(-size // block)], (x.stride(0), out.stride(0))
            launch(x, places, own.view(torch.uint8), out, size, *strides, CHOICES=routes.choices, BLOCK=block)
        return out
    out = x.new_empty(routes.pair.shape[0], size + room)
    out[:, :size] = x[:, :size][routes.token]
    return out


def combine(rows: torch.Tensor, routes: Routes) -> torch.Tensor:
    """Return the sum [F, N] over each token's rows [M, N]. Not for autograd."""
    if routes.places is None:
        out = rows.new_zeros(routes.tokens, rows.shape[1])
        return out.index_add_(0, routes.token, rows)
    places, own = routes.places
    if rows.shape[0] == 0:
        return rows.new_zeros(routes.tokens, rows.shape[1])
    if fuses(rows) and rows.stride(1) == 1:
        from megalora.ops.routing_kernels import combine_kernel

        size, block = rows.shape[1], 1024
        out, mine = rows.new_empty(routes.tokens, size), own.view(torch.uint8)
        launch = combine_kernel[routes.tokens, -(-size // block)]
        launch(rows, places, mine, out, size, rows.stride(0), CHOICES=routes.choices, BLOCK=block)
        return out
    return rows[places].masked_fill_(~own[..., None], 0.0).sum(1)


def by_pair(values: torch.Tensor, routes: Routes) -> torch.Tensor:
    """Return values [M], one a row, as [F, k]: 0 for pairs of other ranks. Not for autograd."""
    if routes.places is None:
        out = values.new_zeros(routes.tokens * routes.choices)
        out[routes.pair] = values
        return out.view(routes.tokens, routes.choices)
    places, own = routes.places
    if values.shape[0] == 0:
        return values.new_zeros(routes.tokens, routes.choices)
    return torch.where(own, values[places], 0.0)
