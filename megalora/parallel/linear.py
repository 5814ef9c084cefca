"""Column- and row-parallel linears that carry their LoRA branch (DESIGN section 3).

Column-parallel linears that read one input (q k v; gate up) run as one group: one dropout mask, one down-projection
for all their branches, one collective. A row-parallel linear (o, down) adds its branch before its one reduction. Either
way the branch adds no activation-sized communication.

Legend: T tokens on this rank, F tokens of the full microbatch (F = T * tp under sequence parallelism, else T = F),
I in_features, O out_features of this rank, R rank of the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megalora.lora import Adapter, initial_factor
from megalora.ops.dropout import Dropout
from megalora.ops.lora_linear import (
    lora_down,
    lora_down_input_grad_,
    lora_down_weight_grad,
    lora_up_,
    lora_up_backward,
)
from megalora.parallel.collectives import all_gather, all_reduce, all_reduce_async, reduce_scatter
from megalora.parallel.mesh import Axis
from megalora.parallel.split import Part, Split, whole_split


@dataclass(frozen=True)
class Tokens:
    """What the linears of one microbatch need to know of its tokens.

    index       [F] int64, Batch.token_index
    local       [T] int64, the part of `index` that this rank holds under sequence parallelism, else all of it
    seed, step  of the run: with `index` they fix every dropout mask; seed None means no dropout (evaluation)
    """

    index: torch.Tensor
    local: torch.Tensor
    seed: int | None
    step: int

    def draw(self, p: float, site: int, feature_offset: int = 0) -> Dropout | None:
        if self.seed is None or p == 0.0:
            return None
        return Dropout(p=p, seed=self.seed, site=site, step=self.step, feature_offset=feature_offset)


class LoraFactor(nn.Module):
    """One factor of a branch: `weight`, a trainable master in float32 (float64 in a float64 model)."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        master = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=master, device=device))


@dataclass(frozen=True)
class Placement:
    """Where a layer's parameters live: tp axis, sequence parallelism, compute dtype, device."""

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device | str


class ParallelLinear(nn.Module):
    """A frozen linear of this rank with an optional LoRA branch; subclasses say how it is cut.

    name      full name in the model: the initial adapter is drawn from it
    site      number of the layer input that it reads: linears that share an input share its dropout mask
    """

    def __init__(
        self,
        name: str,
        weight_split: Split,
        bias_split: Split | None,
        factor_splits: tuple[Split, Split] | None,
        adapter: Adapter | None,
        trains_bias: bool,
        site: int,
        place: Placement,
    ):
        super().__init__()
        self.name, self.site, self.place, self.adapter = name, site, place, adapter
        self._splits = {"weight": weight_split}
        empty = {"dtype": place.dtype, "device": place.device}
        self.weight = nn.Parameter(torch.empty(weight_split.local_shape, **empty), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias_split is not None:
            self._splits["bias"] = bias_split
            bias = torch.empty(bias_split.local_shape, **empty)
            if trains_bias:
                bias = bias.to(torch.promote_types(place.dtype, torch.float32))
            self.bias = nn.Parameter(bias, requires_grad=trains_bias)
        self.lora_A: LoraFactor | None = None
        self.lora_B: LoraFactor | None = None
        if adapter is not None:
            assert factor_splits is not None
            self._splits["lora_A.weight"], self._splits["lora_B.weight"] = factor_splits
            self.lora_A = LoraFactor(*factor_splits[0].local_shape, place.dtype, place.device)
            self.lora_B = LoraFactor(*factor_splits[1].local_shape, place.dtype, place.device)

    def shard_dims(self) -> dict[str, Split]:
        """How each parameter is cut: the one place that loading, saving and gradient reduction read."""
        return self._splits

    @torch.no_grad()
    def reset_adapter(self, seed: int, init_lora_weights: bool | str) -> None:
        """Fills the adapter with its initial values, the same on every layout."""
        if self.adapter is None:
            return
        for key, factor in (("lora_A.weight", self.lora_A), ("lora_B.weight", self.lora_B)):
            split = self._splits[key]
            whole = initial_factor(f"{self.name}.{key}", split.global_shape, seed, init_lora_weights, self.adapter.r)
            factor.weight.copy_(split.slice(whole))

    def trainables(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(A, B, bias), None where absent; the bias also where it is frozen."""
        A = None if self.lora_A is None else self.lora_A.weight
        B = None if self.lora_B is None else self.lora_B.weight
        return A, B, self.bias


class ColumnParallelLinear(ParallelLinear):
    """y_i = x W_i^T + b_i + s (dropout(x) A^T) B_i^T: W, b, B cut on out_features, A whole.

    part  this rank's out_features; ranks may share some (KV heads that the query heads of several ranks read)
    Called through `column_linear`, with the other linears that read the same input.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        part: Part,
        *,
        bias: bool,
        adapter: Adapter | None,
        trains_bias: bool,
        site: int,
        place: Placement,
    ):
        factors = None
        if adapter is not None:
            # dz_i = s dy_i B_i, so dA_i is one term of the sum over tp.
            whole = whole_split((adapter.r, in_features), place.tp, partial_grad=True)
            factors = (whole, part.split((out_features, adapter.r), 0))
        super().__init__(
            name,
            part.split((out_features, in_features), 0),
            part.split((out_features,), 0) if bias else None,
            factors,
            adapter,
            trains_bias,
            site,
            place,
        )


class RowParallelLinear(ParallelLinear):
    """y = reduce_i(x_i W_i^T + s (dropout(x_i) A_i^T) B^T) + b: W, A cut on in_features, B and b whole.

    part  this rank's in_features
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        part: Part,
        *,
        bias: bool,
        adapter: Adapter | None,
        trains_bias: bool,
        site: int,
        place: Placement,
    ):
        assert not part.shared, name
        factors = None
        if adapter is not None:
            # z_i is one term of a sum, and so is dB_i = s dy^T z_i.
            whole = whole_split((out_features, adapter.r), place.tp, partial_grad=True)
            factors = (part.split((adapter.r, in_features), 1), whole)
        super().__init__(
            name,
            part.split((out_features, in_features), 1),
            whole_split((out_features,), place.tp) if bias else None,
            factors,
            adapter,
            trains_bias,
            site,
            place,
        )
        self.feature_offset = part.start

    def forward(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """x [F, I / tp] -> [T, O], reduced over tp."""
        p = 0.0 if self.adapter is None else self.adapter.dropout
        draw = tokens.draw(p, self.site, self.feature_offset)
        return _RowLinear.apply(x, self, draw, tokens.index, *self.trainables())


def column_linear(x: torch.Tensor, linears: Sequence[ColumnParallelLinear], tokens: Tokens) -> tuple[torch.Tensor, ...]:
    """The outputs [F, O_i] of `linears`, which all read x [T, I]: gathered first under sequence parallelism."""
    p = max((linear.adapter.dropout for linear in linears if linear.adapter is not None), default=0.0)
    draw = tokens.draw(p, linears[0].site)
    trainables = [t for linear in linears for t in linear.trainables()]
    return _ColumnLinear.apply(x, tuple(linears), draw, tokens.local, *trainables)


class _ColumnLinear(torch.autograd.Function):
    """Forward: gather (or copy) x. Backward: reduce-scatter (or all-reduce) dx. Nothing is kept for a frozen weight."""

    @staticmethod
    def forward(ctx, x, linears, draw, token_index, *trainables):
        place = linears[0].place
        gathers = place.sequence_parallel and place.tp.size > 1
        As, Bs, biases = trainables[0::3], trainables[1::3], trainables[2::3]
        adapted = [i for i, A in enumerate(As) if A is not None]
        A_cat = _concatenate([As[i] for i in adapted])
        z = None if A_cat is None else lora_down(x, A_cat, token_index, draw)
        x_full = x
        if gathers:  # one collective for x and z
            whole = all_gather(x if z is None else torch.cat([x, z], dim=1), place.tp)
            x_full, z = whole[:, : x.shape[1]], None if z is None else whole[:, x.shape[1] :]
        ranks = [As[i].shape[0] for i in adapted]
        zs = dict(zip(adapted, [] if z is None else z.split(ranks, dim=1), strict=True))
        outputs = []
        for i, linear in enumerate(linears):
            bias = None if biases[i] is None else biases[i].to(x.dtype)
            y = torch.nn.functional.linear(x_full, linear.weight, bias)
            if i in zs:
                lora_up_(y, zs[i], Bs[i], linear.adapter.scaling)
            outputs.append(y)
        ctx.linears, ctx.draw, ctx.adapted, ctx.gathers, ctx.ranks = linears, draw, adapted, gathers, ranks
        needs_a = any(ctx.needs_input_grad[4 + 3 * i] for i in adapted)
        ctx.save_for_backward(x if needs_a else None, z, A_cat, token_index, *Bs)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys):
        x, z, A_cat, token_index, *Bs = ctx.saved_tensors
        linears, adapted, tp = ctx.linears, ctx.adapted, ctx.linears[0].place.tp
        needs_dx = ctx.needs_input_grad[0]
        grads = [None] * (3 * len(linears))
        zs = dict(zip(adapted, [] if z is None else z.split(ctx.ranks, dim=1), strict=True))
        dx, dzs = None, []
        for i, linear in enumerate(linears):
            dy = dys[i]
            if i in zs:
                dz, dB = lora_up_backward(dy, zs[i], Bs[i], linear.adapter.scaling)
                dzs.append(dz)
                grads[3 * i + 1] = dB
            if ctx.needs_input_grad[4 + 3 * i + 2]:
                grads[3 * i + 2] = dy.sum(0, dtype=linear.bias.dtype)
            if needs_dx:
                dx = dy @ linear.weight if dx is None else dx.addmm_(dy, linear.weight)
        dz = _concatenate(dzs, dim=1)
        pending = None
        if ctx.gathers and (needs_dx or dz is not None):  # one collective for dx and dz
            parts = [part for part in (dx, dz) if part is not None]
            local = reduce_scatter(_concatenate(parts, dim=1), tp)
            dx = local[:, : linears[0].weight.shape[1]].contiguous() if needs_dx else None
            dz = None if dz is None else local[:, local.shape[1] - dz.shape[1] :]
        if needs_dx and dz is not None:
            lora_down_input_grad_(dx, dz, A_cat, token_index, ctx.draw)
        if needs_dx and not ctx.gathers:
            pending = all_reduce_async(dx, tp)
        if x is not None and dz is not None:  # runs while dx is reduced
            dA = lora_down_weight_grad(dz, x, A_cat, token_index, ctx.draw)
            for i, part in zip(adapted, dA.split(ctx.ranks, dim=0), strict=True):
                grads[3 * i] = part
        if pending is not None:
            dx = pending.wait()
        return dx, None, None, None, *grads


class _RowLinear(torch.autograd.Function):
    """Forward: reduce-scatter (or all-reduce) y. Backward: gather (or copy) dy."""

    @staticmethod
    def forward(ctx, x, linear, draw, token_index, A, B, bias):
        tp = linear.place.tp
        ctx.gathers = linear.place.sequence_parallel and tp.size > 1
        y = x @ linear.weight.t()
        z = None
        if A is not None:
            z = lora_down(x, A, token_index, draw)
            lora_up_(y, z, B, linear.adapter.scaling)
        y = reduce_scatter(y, tp) if ctx.gathers else all_reduce(y, tp)
        if bias is not None:
            y = y.add_(bias.to(y.dtype))
        ctx.linear, ctx.draw = linear, draw
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, z, A, B, token_index)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, A, B, token_index = ctx.saved_tensors
        linear = ctx.linear
        dy = all_gather(dy, linear.place.tp) if ctx.gathers else dy
        dx = dy @ linear.weight if ctx.needs_input_grad[0] else None
        dA = dB = dbias = None
        if A is not None:
            dz, dB = lora_up_backward(dy, z, B, linear.adapter.scaling)
            if dx is not None:
                lora_down_input_grad_(dx, dz, A, token_index, ctx.draw)
            if x is not None:
                dA = lora_down_weight_grad(dz, x, A, token_index, ctx.draw)
        if ctx.needs_input_grad[6]:
            dbias = dy.sum(0, dtype=linear.bias.dtype)
        return dx, None, None, None, dA, dB, dbias


def _concatenate(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
