"""Linear groups as functions for autograd: what is kept for the backward passes, and the gradients of the source, A, B
and biases. Legend as in megalora.parallel.group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from megalora.ops.dropout import Dropout
from megalora.ops.lora_backward import UpBranch, add_down_weight_grad_, lora_backward_, swiglu_lora_backward_
from megalora.ops.lora_linear import lora_down_input_grad_, lora_up_weight_grad
from megalora.ops.swiglu import swiglu, swiglu_backward
from megalora.parallel.collectives import all_gather, all_reduce, all_reduce_async, reduce_scatter
from megalora.parallel.exchange import gather_product, product_scatter
from megalora.parallel.group import LinearGroup, MLPPair, Product, Trainable
from megalora.parallel.placement import Placement, Tokens


def apply_group(group: LinearGroup, source: torch.Tensor, tokens: Tokens, unread: bool = False) -> torch.Tensor:
    """Return y [F or T, O] of `source`, as `LinearGroup.product` says, for autograd."""
    if not torch.is_grad_enabled():  # nothing is kept for a backward that does not come
        return group.product(source, tokens).y
    return GroupedLinearFunction.apply(source, group, tokens, unread, *group.trainables.values())


def apply_pair(pair: MLPPair, source: torch.Tensor, tokens: Tokens, unread: bool = False) -> torch.Tensor:
    """Return y [T, O] of `source` [T, I + C] or [T, I], as of the groups one after the other, for autograd."""
    first, second = pair.first, pair.second
    if not torch.is_grad_enabled():
        return second.product(first.product(source, tokens).y, tokens).y
    trainables = (*first.trainables.values(), *second.trainables.values())
    return MLPPairFunction.apply(source, pair, tokens, unread, *trainables)


def reduce_terms(terms: torch.Tensor, place: Placement, biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Return the sum over tp of `terms` [F, O], this rank's part of it [T, O], with the biases [O] added once.

    For row-parallel groups that do not reduce (a parallel residual): they have the gradients of their biases.
    """
    y = _ReduceTerms.apply(terms, place)
    for bias in biases:
        y = y if bias is None else y + bias
    return y


class _Kept(NamedTuple):
    """Tensors saved for backward: `source` (where a gradient reads it), `z` [F, R] (unless it is in the source), A as
    it was, the token index of the input, and what DoRA reads of the result."""

    source: torch.Tensor | None
    z: torch.Tensor | None
    A: torch.Tensor | None
    token_index: torch.Tensor
    of_result: torch.Tensor | None


Needs = Mapping[Trainable, bool]  # which of group.trainables want a gradient


def _needs(group: LinearGroup, flags: Sequence[bool]) -> Needs:
    return dict(zip(group.trainables, flags, strict=True))


def _any(needs: Needs, name: str) -> bool:
    return any(needed for (_, kind), needed in needs.items() if kind == name)


class _Sums:
    """What a group's gradients are added to: those that its parameters hold or, for autograd to add, new zeros."""

    def __init__(self, group: LinearGroup, needs: Needs):
        self.told: list[torch.Tensor | None] = []  # what autograd is told, in the order of trainables()
        self._into: dict[Trainable, torch.Tensor] = {}
        self._parameters = group.trainables
        for name, parameter in self._parameters.items():
            into = parameter.grad if needs[name] else None
            fresh = torch.zeros_like(parameter) if needs[name] and into is None else None
            self.told.append(fresh)
            if needs[name]:
                self._into[name] = fresh if into is None else into

    @property
    def dA(self) -> list[torch.Tensor]:
        """One for each adapted linear, what is not wanted to nowhere; none where no A wants a gradient."""
        factors = {name: p for name, p in self._parameters.items() if name[1] == "lora_A"}
        if not any(name in self._into for name in factors):
            return []
        return [self._into[name] if name in self._into else torch.zeros_like(A) for name, A in factors.items()]

    def dB(self, i: int) -> torch.Tensor | None:
        """Return dB of the i-th linear."""
        return self._into.get((i, "lora_B"))

    @property
    def dBs(self) -> list[torch.Tensor]:
        """Of all linears where it is wanted, in order."""
        return [into for (_, kind), into in self._into.items() if kind == "lora_B"]

    def dbiases(self, i: int) -> list[tuple[torch.Tensor, str]]:
        """Return the gradients of the biases of the i-th linear: (into, "bias" or "lora_bias")."""
        return [(self._into[i, kind], kind) for kind in ("bias", "lora_bias") if (i, kind) in self._into]

    @property
    def dmagnitudes(self) -> dict[int, torch.Tensor]:
        """By linear."""
        return {i: into for (i, kind), into in self._into.items() if kind == "magnitude"}


def _keep(
    group: LinearGroup, source: torch.Tensor, product: Product, tokens: Tokens, needs_dx: bool, needs: Needs
) -> _Kept:
    """Return what is kept of a product of `source`."""
    full = product.X
    keeps = _any(needs, "lora_A") or (group.made is not None and needs_dx)
    # z is kept apart where X is not what is kept; without gradients nothing is kept.
    apart = (needs_dx or any(needs.values())) and (full is not source or not keeps)
    z = full[:, group.in_features :].clone() if group.down is not None and apart else None
    of_result = product.kept if _any(needs, "magnitude") else None
    return _Kept(source if keeps else None, z, group.down, group.mask(tokens)[0], of_result)


def _up_branches(group: LinearGroup, kept: _Kept, sums: _Sums) -> list[UpBranch]:
    """Return the branches of a group whose dB is wanted."""
    branches = []
    for i, (linear, rows, columns) in enumerate(zip(group.linears, group.rows, group.branches, strict=True)):
        if sums.dB(i) is not None:
            z = kept.source[:, group.in_features :] if kept.z is None else kept.z
            branches.append(UpBranch(rows, z[:, columns], linear.adapter.scaling, sums.dB(i)))
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
    """Return the gradient of the group's source (None unless needs_dx), from that of its result; adds to `sums`.

    dense       the source came without room, and so does its gradient
    own_ups     false: whoever made dy has seen to the group's dB
    ups_before  the branches of the linears that made what a group makes its input of, whose dB is seen to here
    """
    A, token_index, tp, exchange = kept.A, kept.token_index, group.place.tp, group.place.exchange
    columns, dA = group.in_features, sums.dA
    width = columns + group.room if needs_dx else group.room
    goes_on, dX = needs_dx or A is not None, None
    if group.dora is not None:  # whose factors are not of the biases; those of rows of zeros are 0
        _add_bias_grads(group, dy, sums, cut=group.row_parallel and group.gathers)
        dy = group.dora.backward(dy, kept.of_result, group.own_bias is not None, _own_magnitudes(group, sums))

    product = group.matrix.transposed_multiplier(branch_only=not needs_dx)
    if group.row_parallel and group.gathers:
        if goes_on:
            dX, dy = gather_product(dy, product, width, tp, exchange)
        else:
            dy = all_gather(dy, tp)
    for branch in _up_branches(group, kept, sums) if own_ups else ():
        lora_up_weight_grad(dy[:, branch.rows], branch.z, branch.scaling, branch.dB)
    if group.dora is None:
        _add_bias_grads(group, dy, sums)
    if not goes_on:
        return None
    if dX is None:
        scatters = group.gathers and not group.row_parallel
        dX = product_scatter(dy, product, width, tp, exchange) if scatters else product(dy)
    dz = None if A is None else dX[:, dX.shape[1] - group.room :][:, : sum(group.ranks)]
    if group.made is not None:
        return _made_backward(group, kept, draw, dX, dz, needs_dx, dA, ups_before)
    if not needs_dx:
        if dA:
            add_down_weight_grad_(dA, dz, kept.source[:, :columns], token_index, draw)
        return None
    # Apart where x came without room, so that what made it gets a gradient as dense as its own result.
    out = dX.new_empty(dX.shape[0], columns) if dense and dz is not None else None
    dsource = (dX[:, :columns] if dense else dX) if out is None else out
    if group.row_parallel or group.gathers or group.own_tokens or not group.reduces or tp.size == 1:
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


def _own_magnitudes(group: LinearGroup, sums: _Sums) -> Mapping[int, torch.Tensor]:
    """Return the gradients of magnitudes that this rank adds to: where all of tp hold the same, the first does."""
    tp = group.place.tp
    same = group.row_parallel and group.reduces and not group.gathers
    return {} if same and not tp.is_first else sums.dmagnitudes


def _add_bias_grads(group: LinearGroup, dy: torch.Tensor, sums: _Sums, cut: bool = False) -> None:
    """Add the gradients of the biases, from that of the group's result [F, O]; cut: [T, O], of this rank's tokens."""
    for i, (linear, rows) in enumerate(zip(group.linears, group.rows, strict=True)):
        for into, kind in sums.dbiases(i):
            total = dy[:, rows].sum(0, dtype=into.dtype)
            if cut:
                total = all_reduce(total, group.place.tp)
            into.add_(total, alpha=linear.adapter.scaling if kind == "lora_bias" else 1.0)


def _made_backward(
    group: LinearGroup,
    kept: _Kept,
    draw: Dropout | None,
    dX: torch.Tensor,
    dz: torch.Tensor | None,
    needs_dx: bool,
    dA: Sequence[torch.Tensor],
    ups_before: Sequence[UpBranch],
) -> torch.Tensor | None:
    """Return the rest of `_backward` where x was made of the source: the gradient of gate and up, or of up."""
    A, token_index, columns, made = kept.A, kept.token_index, group.in_features, group.made
    assert made is not None
    if needs_dx and dA:
        dx = dX[:, :columns]
        return swiglu_lora_backward_(dx, kept.source, dz, A, token_index, draw, dA[0], ups_before, made.act)
    if dA:
        add_down_weight_grad_(dA, dz, swiglu(kept.source, 0, *made), token_index, draw)
    if not needs_dx:
        return None
    if dz is not None:
        lora_down_input_grad_(dX[:, :columns], dz, A, token_index, draw)
    dsource = swiglu_backward(dX[:, :columns], kept.source, None, made.act)[0]
    for branch in ups_before:
        lora_up_weight_grad(dsource[:, branch.rows], branch.z, branch.scaling, branch.dB)
    return dsource


class GroupedLinearFunction(torch.autograd.Function):
    """Column-parallel: forward gathers (or copies) X, backward reduce-scatters (or all-reduces) dX.
    Row-parallel: forward reduce-scatters (or all-reduces) y, backward gathers (or copies) dy.
    Nothing is kept for a frozen weight."""

    @staticmethod
    def forward(ctx, source, group, tokens, unread, *trainables):
        product = group.product(source, tokens, unread)
        ctx.group, ctx.draw, ctx.width = group, group.mask(tokens)[1], source.shape[1]
        needs_dx, _, _, _, *flags = ctx.needs_input_grad
        ctx.save_for_backward(*_keep(group, source, product, tokens, needs_dx, _needs(group, flags)))
        return product.y

    @staticmethod
    def backward(ctx, dy):
        needs_dx, _, _, _, *flags = ctx.needs_input_grad
        group, sums = ctx.group, _Sums(ctx.group, _needs(ctx.group, flags))
        dense = ctx.width == group.in_features
        dsource = _backward(group, _Kept(*ctx.saved_tensors), ctx.draw, dy, needs_dx, sums, dense=dense)
        return dsource, None, None, None, *sums.told


class MLPPairFunction(torch.autograd.Function):
    """Both groups as GroupedLinearFunction; the dB of the first is computed where its dy is made."""

    @staticmethod
    def forward(ctx, source, pair, tokens, unread, *trainables):
        first, second = pair.first, pair.second
        ctx.pair, ctx.draws, ctx.width = pair, [group.mask(tokens)[1] for group in (first, second)], source.shape[1]
        needs_dx, needs_first, needs_second = _cut_needs(ctx.needs_input_grad, pair)
        product = first.product(source, tokens)
        gate_up, kept = product.y, _keep(first, source, product, tokens, needs_dx, needs_first)
        del product  # what was gathered is not needed beside the second product
        product = second.product(gate_up, tokens, unread)
        needs_dx = needs_dx or any(needs_first.values())
        ctx.save_for_backward(*kept, *_keep(second, gate_up, product, tokens, needs_dx, needs_second))
        return product.y

    @staticmethod
    def backward(ctx, dy):
        first, second = ctx.pair.first, ctx.pair.second
        needs_dx, needs_first, needs_second = _cut_needs(ctx.needs_input_grad, ctx.pair)
        saved, count = ctx.saved_tensors, len(_Kept._fields)
        kept_first, kept_second = _Kept(*saved[:count]), _Kept(*saved[count:])
        sums_first, sums_second = _Sums(first, needs_first), _Sums(second, needs_second)
        goes_on = needs_dx or any(needs_first.values())
        ups = _up_branches(first, kept_first, sums_first)
        if first.dora is not None:  # dB is of dy times factors: the sum of dy alone is taken apart, and multiplied
            ups = [replace(branch, dB=torch.zeros_like(branch.dB)) for branch in ups]
        dgate_up = _backward(second, kept_second, ctx.draws[1], dy, goes_on, sums_second, ups_before=ups)
        if first.dora is not None:
            for into, branch in zip(sums_first.dBs, ups, strict=True):
                into.addcmul_(branch.dB, first.dora.scale[branch.rows].to(into.dtype).unsqueeze(1))
        ctx.maybe_clear_saved_tensors()  # gate_up goes before the first group's products need memory
        del saved, kept_second, ups
        dsource = None
        if goes_on:
            dense = ctx.width == first.in_features
            dsource = _backward(
                first, kept_first, ctx.draws[0], dgate_up, needs_dx, sums_first, dense=dense, own_ups=False
            )
        return dsource, None, None, None, *sums_first.told, *sums_second.told


class _ReduceTerms(torch.autograd.Function):
    """Forward reduce-scatters (or all-reduces), backward gathers (or copies)."""

    @staticmethod
    def forward(ctx, terms, place):
        ctx.place = place
        return reduce_scatter(terms, place.tp) if place.gathers else all_reduce(terms.clone(), place.tp)

    @staticmethod
    def backward(ctx, dy):
        return all_gather(dy.contiguous(), ctx.place.tp) if ctx.place.gathers else dy, None


def _cut_needs(needs: Sequence[bool], pair: MLPPair) -> tuple[bool, Needs, Needs]:
    """Return which gradients are wanted: (of the source, of the first group's trainables, of the second's)."""
    end = 4 + len(pair.first.trainables)
    return needs[0], _needs(pair.first, needs[4:end]), _needs(pair.second, needs[end:])
