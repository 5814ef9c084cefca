"""Rows of a tensor at given places, and the way back as a gather of its own, which has one order on every device."""

from __future__ import annotations

import torch


class Placed(torch.autograd.Function):
    """x [a, ...] by index [b]: x[index], with zeros where `hidden` [b]; `back` [a] is the way back, of whose gradient
    nothing comes where `idle` [a]."""

    @staticmethod
    def forward(ctx, x, index, back, hidden, idle):
        ctx.back, ctx.hidden, ctx.idle = back, hidden, idle
        return hidden_at(x.index_select(0, index), hidden)

    @staticmethod
    def backward(ctx, grad):
        # What fills chunks up has no gradient: it changes no state, and nobody reads it. Its own are hidden behind it.
        if ctx.hidden is not None:
            grad = hidden_at(grad.clone(), ctx.hidden)
        return hidden_at(grad.index_select(0, ctx.back), ctx.idle), None, None, None, None


def hidden_at(x: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """Return x with zeros where it says so, in place."""
    return x if where is None else x.masked_fill_(where.view(-1, *[1] * (x.dim() - 1)), 0.0)
