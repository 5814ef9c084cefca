"""Experts as a function for autograd: tokens to their experts, gate up, down, and the weighted sum back.

The weight of a pair is applied to what down reads, which is the same sum and needs none of down's results in backward:

    X   = [x of the pair's token | z]        gate_up = X P_e^T + b_e
    X'  = [w silu(gate) up | z']             y       = X' P'_e^T + w b'_e   out of a token = sum of its pairs' y

Kept for backward: x, gate_up, z, z' and the weights; the rest is made again. Legend as in megalora.parallel.experts.
"""

from __future__ import annotations

from typing import Any

import torch

from megalora.ops.dropout import Dropout, dropout_add_
from megalora.ops.grouped import grouped
from megalora.ops.routing import Routes, by_pair, combine, dispatch, route
from megalora.ops.weighted_gate import SILU, Gate
from megalora.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megalora.parallel.experts import ExpertGroup, dropped
from megalora.parallel.placement import Placement, Tokens


class ExpertPair:
    """gate and up, then down, of this rank's experts [first, stop); gate: what stands between them."""

    def __init__(self, up: ExpertGroup, down: ExpertGroup, first: int, gate: Gate = SILU):
        assert sum(up.sizes) == 2 * down.in_features and len(up.experts) == len(down.experts)
        assert down.biased <= gate.weighs_result, "the bias of what is not weighed is not weighed either"
        self.up, self.down, self.first, self.stop, self.gate = up, down, first, first + len(up.experts), gate

    def row_index(self, routes: Routes, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Return what dropout is drawn from at each row, [M] int64, at the input of gate and up, and at that of down.

        None where nothing is dropped. The first is the token's: all experts read one x. The second has the expert in
        its high word.
        """
        if self.up.draw(tokens) is None and self.down.draw(tokens) is None:
            return None, None
        index = tokens.index[routes.token]
        return index, index + ((routes.expert + self.first) << 32)


def apply_experts(
    pair: ExpertPair, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, tokens: Tokens
) -> torch.Tensor:
    """Return this rank's term [F, hidden_size] of the experts' sum: x [F, hidden_size], weights and chosen [F, k]."""
    if not torch.is_grad_enabled():
        return _forward(pair, x, weights, chosen, tokens)[0]
    # Gradients of factors are added where they lie; one of them makes autograd call backward.
    anchor = pair.down.anchor if pair.up.anchor is None else pair.up.anchor
    return _Experts.apply(x, weights, anchor, pair, chosen, tokens)


def gather_tokens(x: torch.Tensor, place: Placement) -> torch.Tensor:
    """Return x [F, ...] of all tokens from this rank's [T, ...], for work whose gradients are terms of a sum."""
    return x if place.tp.size == 1 else _GatherTokens.apply(x, place)


class _GatherTokens(torch.autograd.Function):
    """Forward gathers (or copies), backward reduce-scatters (or all-reduces)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: Placement) -> torch.Tensor:
        ctx.place = place
        return all_gather(x, place.tp) if place.gathers else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        place = ctx.place
        if place.gathers:
            return reduce_scatter(dx.contiguous(), place.tp), None
        return all_reduce(dx.clone(memory_format=torch.contiguous_format), place.tp), None


def _forward(pair: ExpertPair, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, tokens: Tokens):
    """Return (the term, routes, gate_up, z of gate and up, z of down)."""
    up, down = pair.up, pair.down
    routes = route(chosen, pair.first, pair.stop, x.dtype)
    index, down_index = pair.row_index(routes, tokens)
    X = dispatch(x, routes, up.in_features, up.room)
    up.project(X, routes, index, tokens)
    gate_up, z_up = up.multiply(X, routes.bounds, routes.expert), X[:, up.in_features :].clone()
    del X
    X = pair.gate.forward(gate_up, weights, routes, down.room)
    down.project(X, routes, down_index, tokens)
    of_rows = weights.flatten()[routes.pair, None].to(x.dtype) if down.biased else None
    y, z_down = down.multiply(X, routes.bounds, routes.expert, of_rows), X[:, down.in_features :].clone()
    return combine(y, routes), routes, gate_up, z_up, z_down


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, anchor, pair, chosen, tokens):
        out, ctx.routes, gate_up, z_up, z_down = _forward(pair, x, weights, chosen, tokens)
        ctx.pair, ctx.tokens, ctx.factors = pair, tokens, (pair.up.down, pair.down.down)
        ctx.save_for_backward(x, weights, gate_up, z_up, z_down)
        return out

    @staticmethod
    def backward(ctx, dout):
        pair, tokens, routes = ctx.pair, ctx.tokens, ctx.routes
        up, down = pair.up, pair.down
        x, weights, gate_up, z_up, z_down = ctx.saved_tensors
        index, down_index = pair.row_index(routes, tokens)
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        dy = dispatch(dout, routes, dout.shape[1])
        X = pair.gate.forward(gate_up, weights, routes, 0)
        trains_up = up.anchor is not None
        dh = _backward(
            down, dy, X, z_down, ctx.factors[1], routes, down_index, down.draw(tokens),
            needs_x or trains_up or needs_weights,
        )  # fmt: skip
        of_bias = (dy * down.bias_of(routes.expert)).sum(1, dtype=weights.dtype) if down.biased else 0
        del dy, X
        if dh is None:
            return (None,) * 6
        dgate_up, of_rows = pair.gate.backward(dh, gate_up, weights, routes)
        of_rows = of_rows + of_bias if down.biased else of_rows
        dweights = by_pair(of_rows, routes) if needs_weights else None
        if not (needs_x or trains_up):
            return None, dweights, None, None, None, None
        rows = dispatch(x, routes, up.in_features) if trains_up else None
        dx = _backward(up, dgate_up, rows, z_up, ctx.factors[0], routes, index, up.draw(tokens), needs_x)
        return None if dx is None else combine(dx, routes), dweights, None, None, None, None


def _backward(
    group: ExpertGroup,
    dy: torch.Tensor,
    x: torch.Tensor | None,
    z: torch.Tensor,
    A: torch.Tensor | None,
    routes: Routes,
    index: torch.Tensor | None,
    draw: Dropout | None,
    needs_dx: bool,
) -> torch.Tensor | None:
    """Return dx [M, I] (None unless needs_dx) of a group's rows, from dy [M, O]; add to the gradients of its factors.

    x  [M, I], read where factors want gradients; z [M, C] of the forward; A [E, R, I] as it was then
    """
    bounds, trains = routes.bounds, group.anchor is not None
    if A is None or not (needs_dx or trains):
        return group.multiply_transposed(dy, bounds) if needs_dx else None
    dz = group.branch_transposed(dy, bounds, z if trains else None)
    if trains:
        group.add_down_grads(dz, dropped(x, index, draw), bounds)
    if not needs_dx:
        return None
    if draw is None:
        return group.multiply_transposed(dy, bounds, dz, A)
    dx = group.multiply_transposed(dy, bounds)
    assert index is not None
    dropout_add_(dx, grouped(dz, A, bounds), index, draw)
    return dx
