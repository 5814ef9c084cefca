"""The backward passes of LinearGroup and GatedPair (megalora.parallel.linear): what is kept for them, and the gradients
of the source, A, B and biases. Legend as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from megalora.ops.dropout import Dropout
from megalora.ops.lora_backward import UpBranch, add_down_weight_grad_, lora_backward_, swiglu_lora_backward_
from megalora.ops.lora_linear import lora_down_input_grad_, lora_up_weight_grad
from megalora.ops.matmul import matmul
from megalora.ops.swiglu import swiglu, swiglu_backward
from megalora.parallel.collectives import all_gather, all_reduce_async
from megalora.parallel.exchange import gather_product, product_scatter

if TYPE_CHECKING:
    from megalora.parallel.linear import LinearGroup, Tokens


class _Kept(NamedTuple):
    """What a group keeps of a microbatch: its source, where a gradient reads it; z [F, R], where that is not in the
    source; A as it was; whose tokens its input has."""

    source: torch.Tensor | None
    z: torch.Tensor | None
    A: torch.Tensor | None
    token_index: torch.Tensor


class _Sums:
    """What a group's gradients are added to: those that its parameters hold or, for autograd to add, new zeros."""

    def __init__(self, group: LinearGroup, needs: Sequence[bool]):
        """needs: which of group.trainables() want a gradient."""
        self.told: list[torch.Tensor | None] = []  # what autograd is told, in their order
        self._into: list[torch.Tensor | None] = []
        self._trainables = group.trainables()
        for parameter, needed in zip(self._trainables, needs, strict=True):
            into = parameter.grad if needed else None
            fresh = torch.zeros_like(parameter) if needed and into is None else None
            self.told.append(fresh)
            self._into.append(fresh if into is None else into)

    @property
    def dA(self) -> list[torch.Tensor]:
        """One for each adapted linear, what is not wanted to nowhere; none where no A wants a gradient."""
        if all(into is None for into in self._into[0::3]):
            return []
        adapted = [(A, into) for A, into in zip(self._trainables[0::3], self._into[0::3], strict=True) if A is not None]
        return [torch.zeros_like(A) if into is None else into for A, into in adapted]

    def dB(self, i: int) -> torch.Tensor | None:
        """Of the i-th linear."""
        return self._into[3 * i + 1]

    def dbias(self, i: int) -> torch.Tensor | None:
        return self._into[3 * i + 2]


def _keep(
    group: LinearGroup, source: torch.Tensor, full: torch.Tensor, tokens: Tokens, needs_dx: bool, needs: Sequence[bool]
) -> _Kept:
    """Of a product of `source` whose X is `full`. needs: which of group.trainables() want a gradient."""
    keeps = any(needs[0::3]) or (group.gated and needs_dx)
    # z is kept apart where X is not what is kept; without gradients nothing is kept.
    apart = (needs_dx or any(needs)) and (full is not source or not keeps)
    z = full[:, group.in_features :].clone() if group.down is not None and apart else None
    return _Kept(source if keeps else None, z, group.down, group.mask(tokens)[0])


def _up_branches(group: LinearGroup, kept: _Kept, sums: _Sums) -> list[UpBranch]:
    """The branches of a group whose dB is wanted."""
    branches = []
    for i, (linear, (rows, place)) in enumerate(zip(group.linears, group.spans, strict=True)):
        if sums.dB(i) is not None:
            z = kept.source[:, group.in_features :] if kept.z is None else kept.z
            z_here = z[:, place.start - group.in_features : place.stop - group.in_features]
            branches.append(UpBranch(rows, z_here, linear.adapter.scaling, sums.dB(i)))
    return branches


def _backward(
    group: LinearGroup,
    kept: _Kept,
    draw: Dropout | None,
    dy: torch.Tensor,
    needs_dx: bool,
    sums: _Sums,
    *,
    dense: bool = False,
    own_ups: bool = True,
    ups_before: Sequence[UpBranch] = (),
) -> torch.Tensor | None:
    """The gradient of the group's source (None unless needs_dx), from that of its result; adds to `sums`.

    dense       the source came without room, and so does its gradient
    own_ups     false: whoever made dy has seen to the group's dB
    ups_before  the branches that a gated group's source was made with, whose dB is seen to here
    """
    A, token_index, tp, exchange = kept.A, kept.token_index, group.place.tp, group.place.exchange
    columns, dA = group.in_features, sums.dA
    matrix = group.matrix if needs_dx else group.matrix[:, columns:]
    goes_on, dX = needs_dx or A is not None, None

    def product(rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return matmul(rows, matrix, out)

    if group.row_parallel and group.gathers:
        if goes_on:
            dX, dy = gather_product(dy, product, matrix.shape[1], tp, exchange)
        else:
            dy = all_gather(dy, tp)
    for branch in _up_branches(group, kept, sums) if own_ups else ():
        lora_up_weight_grad(dy[:, branch.rows], branch.z, branch.scaling, branch.dB)
    for i, (rows, _) in enumerate(group.spans):
        if sums.dbias(i) is not None:
            sums.dbias(i).add_(dy[:, rows].sum(0, dtype=sums.dbias(i).dtype))
    if not goes_on:
        return None
    if dX is None:
        scatters = group.gathers and not group.row_parallel
        dX = product_scatter(dy, product, matrix.shape[1], tp, exchange) if scatters else product(dy)
    dz = None if A is None else dX[:, dX.shape[1] - group.room :][:, : sum(group.ranks)]
    if group.gated:
        return _gated_backward(group, kept, draw, dX, dz, needs_dx, dA, ups_before)
    if not needs_dx:
        if dA:
            add_down_weight_grad_(dA, dz, kept.source[:, :columns], token_index, draw)
        return None
    # Apart where x came without room, so that what made it gets a gradient as dense as its own result.
    out = dX.new_empty(dX.shape[0], columns) if dense and dz is not None else None
    dsource = (dX[:, :columns] if dense else dX) if out is None else out
    if group.row_parallel or group.gathers or tp.size == 1:
        if dA:
            lora_backward_(dX[:, :columns], dz, kept.source[:, :columns], A, token_index, draw, dA, out)
        elif dz is not None:
            lora_down_input_grad_(dX[:, :columns], dz, A, token_index, draw, out)
        return dsource
    if dz is not None:
        lora_down_input_grad_(dX[:, :columns], dz, A, token_index, draw, out)
        dz = dz.clone()  # this rank's term, before the sum over it
    pending = all_reduce_async(dsource, tp)
    if dA:  # runs while dX is reduced
        add_down_weight_grad_(dA, dz, kept.source[:, :columns], token_index, draw)
    return pending.wait()


def _gated_backward(
    group: LinearGroup,
    kept: _Kept,
    draw: Dropout | None,
    dX: torch.Tensor,
    dz: torch.Tensor | None,
    needs_dx: bool,
    dA: Sequence[torch.Tensor],
    ups_before: Sequence[UpBranch],
) -> torch.Tensor | None:
    """The rest of `_backward` where x was made of the source: the gradient of gate and up."""
    A, token_index, columns = kept.A, kept.token_index, group.in_features
    if needs_dx and dA:
        return swiglu_lora_backward_(dX[:, :columns], kept.source, dz, A, token_index, draw, dA[0], ups_before)
    if dA:
        add_down_weight_grad_(dA, dz, swiglu(kept.source), token_index, draw)
    if not needs_dx:
        return None
    if dz is not None:
        lora_down_input_grad_(dX[:, :columns], dz, A, token_index, draw)
    dsource = swiglu_backward(dX[:, :columns], kept.source, None)[0]
    for branch in ups_before:
        lora_up_weight_grad(dsource[:, branch.rows], branch.z, branch.scaling, branch.dB)
    return dsource


class GroupedLinearFunction(torch.autograd.Function):
    """Column-parallel: forward gathers (or copies) X, backward reduce-scatters (or all-reduces) dX.
    Row-parallel: forward reduce-scatters (or all-reduces) y, backward gathers (or copies) dy.
    Nothing is kept for a frozen weight."""

    @staticmethod
    def forward(ctx, source, group, tokens, *trainables):
        y, full = group.product(source, tokens)
        ctx.group, ctx.draw, ctx.width = group, group.mask(tokens)[1], source.shape[1]
        needs_dx, _, _, *needs = ctx.needs_input_grad
        ctx.save_for_backward(*_keep(group, source, full, tokens, needs_dx, needs))
        return y

    @staticmethod
    def backward(ctx, dy):
        needs_dx, _, _, *needs = ctx.needs_input_grad
        group, sums = ctx.group, _Sums(ctx.group, needs)
        dense = ctx.width == group.in_features
        dsource = _backward(group, _Kept(*ctx.saved_tensors), ctx.draw, dy, needs_dx, sums, dense=dense)
        return dsource, None, None, *sums.told


class GatedPairFunction(torch.autograd.Function):
    """Both groups as GroupedLinearFunction; the dB of the first is seen to where its dy is made."""

    @staticmethod
    def forward(ctx, source, pair, tokens, *trainables):
        first, second = pair.first, pair.second
        ctx.pair, ctx.draws, ctx.width = pair, [group.mask(tokens)[1] for group in (first, second)], source.shape[1]
        needs_dx, needs_first, needs_second = _cut_needs(ctx.needs_input_grad, first)
        gate_up, full = first.product(source, tokens)
        kept = _keep(first, source, full, tokens, needs_dx, needs_first)
        del full  # what was gathered is not needed beside the second product
        y, X = second.product(gate_up, tokens)
        needs_dx = needs_dx or any(needs_first)
        ctx.save_for_backward(*kept, *_keep(second, gate_up, X, tokens, needs_dx, needs_second))
        return y

    @staticmethod
    def backward(ctx, dy):
        first, second = ctx.pair.first, ctx.pair.second
        needs_dx, needs_first, needs_second = _cut_needs(ctx.needs_input_grad, first)
        saved, count = ctx.saved_tensors, len(_Kept._fields)
        kept_first, kept_second = _Kept(*saved[:count]), _Kept(*saved[count:])
        sums_first, sums_second = _Sums(first, needs_first), _Sums(second, needs_second)
        ups, goes_on = _up_branches(first, kept_first, sums_first), needs_dx or any(needs_first)
        dgate_up = _backward(second, kept_second, ctx.draws[1], dy, goes_on, sums_second, ups_before=ups)
        ctx.maybe_clear_saved_tensors()  # gate_up goes before the first group's products need memory
        del saved, kept_second, ups
        dsource = None
        if goes_on:
            dense = ctx.width == first.in_features
            dsource = _backward(
                first, kept_first, ctx.draws[0], dgate_up, needs_dx, sums_first, dense=dense, own_ups=False
            )
        return dsource, None, None, *sums_first.told, *sums_second.told


def _cut_needs(needs: Sequence[bool], first: LinearGroup) -> tuple[bool, Sequence[bool], Sequence[bool]]:
    """(of the source, of the first group's trainables, of the second's)."""
    end = 3 + 3 * len(first.linears)
    return needs[0], needs[3:end], needs[end:]
