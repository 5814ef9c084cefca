"""Experts as a function for autograd: tokens to their experts, gate up, down, and the weighted sum back.

The weight of a pair is applied to what down reads, which is the same sum and needs none of down's results in backward:

    X   = [x of the pair's token | z]        gate_up = X P_e^T + b_e
    X'  = [w silu(gate) up | z']             y       = X' P'_e^T + w b'_e   out of a token = sum of its pairs' y

Kept for backward: x, gate_up, z, z' and the weights; the rest is made again. Legend as in megalora.parallel.experts.
"""

from __future__ import annotations

from typing import Any

import torch

from megalora.ops.dispatched import AtTokens, Rows, rows_of
from megalora.ops.dropout import Dropout, dropout_add_
from megalora.ops.grouped import grouped
from megalora.ops.routing import Routes, by_pair, combine, route
from megalora.ops.weighted_gate import SILU, Gate
from megalora.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megalora.parallel.experts import ExpertGroup, dropped
from megalora.parallel.placement import Placement, Tokens


class ExpertPair:
    """gate and up, then down, of this rank's experts [first, stop); gate: what stands between them."""

    def __init__(self, up: ExpertGroup, down: ExpertGroup, first: int, gate: Gate = SILU):
        assert sum(up.sizes) == gate.parts * down.in_features and len(up.experts) == len(down.experts)
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
    X = up.dispatch(x, routes, index, tokens)
    gate_up, z_up = up.multiply(X, routes.bounds, routes.expert), up.z_of(X)
    del X
    X = down.gated(pair.gate, gate_up, weights, routes, down_index, tokens)
    of_rows = weights.flatten()[routes.pair, None].to(x.dtype) if down.biased else None
    y, z_down = down.multiply(X, routes.bounds, routes.expert, of_rows), down.z_of(X)
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
        trains_up, trains_down = up.anchor is not None, down.anchor is not None
        up_draw, down_draw = up.draw(tokens), down.draw(tokens)
        dy: Rows = AtTokens(dout, routes)
        of_bias = None
        if down.biased:
            dy = rows_of(dy)
            of_bias = (dy * down.bias_of(routes.expert)).sum(1, dtype=weights.dtype)
        dy, dz = _dz(down, dy, z_down, ctx.factors[1], routes)
        if not (needs_x or trains_up or needs_weights):
            if dz is not None:
                X = pair.gate.forward(gate_up, weights, routes, 0)
                down.add_down_grads(dz, dropped(X, down_index, down_draw), routes.bounds)
            return (None,) * 6
        dh = _dx(down, dy, dz, ctx.factors[1], routes, down_index, down_draw)
        del dy
        grads = pair.gate.backward(dh, gate_up, weights, routes, trains_down)
        dgate_up, of_rows = grads.gate_up, grads.weights
        if dz is not None and grads.result is not None:
            down.add_down_grads(dz, dropped(grads.result, down_index, down_draw), routes.bounds)
        del dh, dz, grads
        dweights = by_pair(of_rows if of_bias is None else of_rows + of_bias, routes) if needs_weights else None
        if not (needs_x or trains_up):
            return None, dweights, None, None, None, None
        dgate_up, dz = _dz(up, dgate_up, z_up, ctx.factors[0], routes)
        if dz is not None and trains_up:
            read = AtTokens(x, routes)
            up.add_down_grads(dz, read if up_draw is None else dropped(read.rows(), index, up_draw), routes.bounds)
        if not needs_x:
            return None, dweights, None, None, None, None
        dx = _dx(up, dgate_up, dz, ctx.factors[0], routes, index, up_draw)
        del dgate_up
        return combine(dx, routes), dweights, None, None, None, None


def _dz(
    group: ExpertGroup, dy: Rows, z: torch.Tensor, A: torch.Tensor | None, routes: Routes
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (dy [M, O], dz [M, R]; None without branches); add to the gradients of a group's B.

    z [M, R or more] and A [E, R, I] of the forward
    """
    if A is None:
        return rows_of(dy), None
    return group.branch_transposed(dy, routes.bounds, None if group.anchor is None else z)


def _dx(
    group: ExpertGroup,
    dy: torch.Tensor,
    dz: torch.Tensor | None,
    A: torch.Tensor | None,
    routes: Routes,
    index: torch.Tensor | None,
    draw: Dropout | None,
) -> torch.Tensor:
    """Return dx [M, I] of a group's rows from dy [M, O] and dz [M, R]; A [E, R, I] of the forward."""
    if dz is None or A is None or draw is None:
        return group.multiply_transposed(dy, routes.bounds, dz, A)
    dx = group.multiply_transposed(dy, routes.bounds)
    assert index is not None
    dropout_add_(dx, grouped(dz, A, routes.bounds), index, draw)
    return dx
