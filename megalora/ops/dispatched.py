"""Products of experts whose long operand lies at the tokens, or is made of gate and up. On Hopper in bfloat16 one
kernel reads it there, or makes it; elsewhere its rows are dispatched, or made, first.

Legend: F tokens, M rows (pairs of token and expert), E matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megalora.ops import grouped_gpu
from megalora.ops.grouped import Bounds, BranchGrad, grouped_branch_, grouped_nt, grouped_outer_
from megalora.ops.routing import Routes, dispatch
from megalora.ops.weighted_gate import SILU, Gate


class AtTokens(NamedTuple):
    """The rows of tokens, not dispatched: row m is that of x [F, N] whose token chose row m's expert."""

    x: torch.Tensor
    routes: Routes

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return self.routes.pair.shape[0], self.x.shape[1]

    def rows(self) -> torch.Tensor:
        """Return the rows [M, N]."""
        return dispatch(self.x, self.routes, self.x.shape[1])


Rows = torch.Tensor | AtTokens  # [M, N]


def rows_of(rows: Rows) -> torch.Tensor:
    """Return `rows` [M, N] as a tensor."""
    return rows.rows() if isinstance(rows, AtTokens) else rows


def dispatch_nt(x: torch.Tensor, P: torch.Tensor, routes: Routes, room: int) -> torch.Tensor:
    """Return [X | X P_e^T | 0] [M, I + room], X the token of each row: x [F, I], P [E, R, I], R at most room.

    Not for autograd.
    """
    if isinstance(routes.bounds, torch.Tensor) and P.shape[1] <= grouped_gpu.MOST_THIN and grouped_gpu.takes(x, P):
        return grouped_gpu.dispatch_thin(x, routes.pair, routes.choices, P, routes.bounds, room)
    X = dispatch(x, routes, x.shape[1], room)
    grouped_nt(X[:, : x.shape[1]], P, routes.bounds, out=X[:, x.shape[1] :])
    return X


def gate_nt(
    gate: Gate, gate_up: torch.Tensor, weights: torch.Tensor, P: torch.Tensor, routes: Routes, room: int
) -> torch.Tensor:
    """Return [X | X P_e^T | 0] [M, I + room], X what `gate` makes: gate_up [M, 2 I], weights [F, k], P [E, R, I], R at
    most room.

    Not for autograd.
    """
    bounds = routes.bounds
    fits = gate == SILU and gate_up.is_contiguous() and P.shape[1] <= grouped_gpu.MOST_THIN
    if isinstance(bounds, torch.Tensor) and fits and grouped_gpu.takes(gate_up, P):
        return grouped_gpu.gate_thin(gate_up, weights.contiguous(), routes.pair, P, bounds, room)
    X = gate.forward(gate_up, weights, routes, room)
    grouped_nt(X[:, : P.shape[2]], P, bounds, out=X[:, P.shape[2] :])
    return X


def outer_(outs: list[torch.Tensor], a: torch.Tensor, b: Rows, bounds: Bounds, scale: float = 1.0) -> None:
    """Add scale a_e^T b_e to outs: megalora.ops.grouped.grouped_outer_."""
    if isinstance(b, AtTokens) and isinstance(bounds, torch.Tensor):
        x, (pair, choices) = b.x, (b.routes.pair, b.routes.choices)
        if a.shape[1] <= x.shape[1] and grouped_gpu.takes(a, x) and grouped_gpu.adds_to(outs, a, x):
            grouped_gpu.outer_(outs, a, x, bounds, scale, pair, choices)
            return
    grouped_outer_(outs, a, rows_of(b), bounds, scale)


def branch_(
    grads: Sequence[BranchGrad], dy: Rows, z: torch.Tensor, B: torch.Tensor, bounds: Bounds
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dy [M, O], dz = dy B_e [M, R]), and add to each of `grads` its part of dy_e^T z_e:
    megalora.ops.grouped.grouped_branch_.
    """
    if isinstance(dy, AtTokens) and isinstance(bounds, torch.Tensor):
        x, (pair, choices) = dy.x, (dy.routes.pair, dy.routes.choices)
        if grouped_gpu.takes(x, z, B) and grouped_gpu.joins(grads, z):
            return grouped_gpu.branch_(grads, x, z, B, bounds, pair, choices)
    dy = rows_of(dy)
    return dy, grouped_branch_(grads, dy, z, B, bounds)
