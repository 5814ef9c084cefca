"""Column- and row-parallel linears that carry their LoRA branches (DESIGN section 3).

Linears that read one input form a group: q k v, gate up (column-parallel), o, down (row-parallel, alone). It is one
matrix P = [W | s B] (see megalora.ops.lora_linear), one dropout mask and one down-projection, one collective. A
row-parallel group adds its branch before its one reduction. Either way the branch adds no activation-sized message.

Legend: T tokens on this rank, F tokens of the full microbatch (F = T * tp under sequence parallelism, else T = F),
I in_features, O out_features of the group on this rank, R rank of its branches together, C columns of room for z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megalora.lora import Adapter, initial_factor
from megalora.ops.dropout import Dropout
from megalora.ops.lora_linear import lora_down_, room_for
from megalora.ops.matmul import matmul_nt
from megalora.ops.scaled_copy import scaled_copy_
from megalora.ops.swiglu import swiglu, swiglu_down
from megalora.parallel.collectives import all_reduce, local_tokens
from megalora.parallel.exchange import Exchange, gather_product, product_scatter
from megalora.parallel.linear_grad import GatedPairFunction, GroupedLinearFunction
from megalora.parallel.mesh import Axis
from megalora.parallel.split import Part, Split, whole_split


@dataclass(frozen=True)
class Tokens:
    """What the linears of one microbatch need to know of its tokens.

    index       [F] int64, Batch.token_index
    local       [T] int64, the part of `index` that this rank holds under sequence parallelism, else all of it
    seed, step  of the run: with `index` they fix every dropout mask; seed None means no dropout (evaluation). A step
                may be an int64 scalar on the device (see Dropout)
    """

    index: torch.Tensor
    local: torch.Tensor
    seed: int | None
    step: int | torch.Tensor

    def draw(self, p: float, site: int, feature_offset: int = 0) -> Dropout | None:
        if self.seed is None or p == 0.0:
            return None
        return Dropout(p=p, seed=self.seed, site=site, step=self.step, feature_offset=feature_offset)


@dataclass(frozen=True)
class Placement:
    """Where a layer's parameters live: tp axis, sequence parallelism, compute dtype, device.

    exchange  how tokens travel beside the products, under sequence parallelism; None: by collectives, before and after
    """

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device | str
    exchange: Exchange | None = None

    @property
    def master_dtype(self) -> torch.dtype:
        """Of what is trained: float32, or float64 in a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    def own_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """x [F, ...] -> [T, ...], a view: this rank's tokens under sequence parallelism, else all."""
        return local_tokens(x, self.tp) if self.sequence_parallel else x


class LoraFactor(nn.Module):
    """One factor of a branch: `weight`, a trainable master."""

    def __init__(self, shape: tuple[int, ...], place: Placement):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=place.master_dtype, device=place.device))


class ParallelLinear(nn.Module):
    """The parameters of one frozen linear on this rank, by their HF names, with its adapter; a LinearGroup applies it.

    weight  [O_i, I]: a view of its group's matrix, given by the group
    name    full name in the model: the initial adapter is drawn from it
    """

    def __init__(
        self,
        name: str,
        weight_split: Split,
        bias_split: Split | None,
        factor_splits: tuple[Split, Split],
        adapter: Adapter | None,
        trains_bias: bool,
        place: Placement,
    ):
        super().__init__()
        self.name, self.adapter = name, adapter
        self._splits = {"weight": weight_split}
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if bias_split is not None:
            self._splits["bias"] = bias_split
            dtype = place.master_dtype if trains_bias else place.dtype
            bias = torch.empty(bias_split.local_shape, dtype=dtype, device=place.device)
            self.bias = nn.Parameter(bias, requires_grad=trains_bias)
        self.lora_A: LoraFactor | None = None
        self.lora_B: LoraFactor | None = None
        if adapter is not None:
            self._splits["lora_A.weight"], self._splits["lora_B.weight"] = factor_splits
            self.lora_A = LoraFactor(factor_splits[0].local_shape, place)
            self.lora_B = LoraFactor(factor_splits[1].local_shape, place)

    def shard_dims(self) -> dict[str, Split]:
        """How each parameter is cut: the one place that loading, saving and gradient reduction read."""
        return self._splits

    @property
    def rank(self) -> int:
        return 0 if self.adapter is None else self.adapter.r

    @torch.no_grad()
    def reset_adapter(self, seed: int, init_lora_weights: bool | str) -> None:
        """Fills the adapter with its initial values, the same on every layout."""
        if self.adapter is None:
            return
        for key, factor in (("lora_A.weight", self.lora_A), ("lora_B.weight", self.lora_B)):
            split = self._splits[key]
            whole = initial_factor(f"{self.name}.{key}", split.global_shape, seed, init_lora_weights, self.adapter.r)
            factor.weight.copy_(split.slice(whole))


class ColumnParallelLinear(ParallelLinear):
    """y_i = x W_i^T + b_i + s (dropout(x) A^T) B_i^T: W, b, B cut on out_features, A whole.

    part  this rank's out_features; ranks may share some (KV heads that the query heads of several ranks read)
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
        place: Placement,
    ):
        r = 0 if adapter is None else adapter.r
        super().__init__(
            name,
            part.split((out_features, in_features), 0),
            part.split((out_features,), 0) if bias else None,
            # dz_i = s dy_i B_i, so dA_i is one term of the sum over tp.
            (whole_split((r, in_features), place.tp, partial_grad=True), part.split((out_features, r), 0)),
            adapter,
            trains_bias,
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
        place: Placement,
    ):
        assert not part.shared, name
        r = 0 if adapter is None else adapter.r
        super().__init__(
            name,
            part.split((out_features, in_features), 1),
            whole_split((out_features,), place.tp) if bias else None,
            # z_i is one term of a sum, and so is dB_i = s dy^T z_i.
            (part.split((r, in_features), 1), whole_split((out_features, r), place.tp, partial_grad=True)),
            adapter,
            trains_bias,
            place,
        )
        self.feature_offset = part.start


class LinearGroup:
    """Linears that read one input, as one matrix. Owns their weights; the parameters stay theirs.

    site   number of the input: it fixes the dropout mask, which all branches share
    gated  the input is silu(gate) * up of what the group is given, gate_up [T, 2 I]: made here, and made again in
           backward rather than kept
    The group is row-parallel where its one linear is, else column-parallel.
    """

    def __init__(self, linears: Sequence[ParallelLinear], site: int, place: Placement, *, gated: bool = False):
        self.linears, self.site, self.place, self.gated = tuple(linears), site, place, gated
        self.row_parallel = isinstance(linears[0], RowParallelLinear)
        assert not (self.row_parallel and len(linears) > 1)
        self.in_features = linears[0].shard_dims()["weight"].local_shape[1]
        self.sizes = [linear.shard_dims()["weight"].local_shape[0] for linear in linears]
        self.ranks = [linear.rank for linear in linears]
        self.room = room_for(sum(self.ranks), torch.device(place.device).type)
        self.dropout = max((linear.adapter.dropout for linear in linears if linear.adapter is not None), default=0.0)
        rows, columns = sum(self.sizes), self.in_features + self.room
        self.matrix = torch.empty(rows, columns, dtype=place.dtype, device=place.device)
        self._ready = self.room == 0 and linears[0].bias is None  # whether refresh() has been here
        self.down: torch.Tensor | None = None  # A of all branches [R, I] in the compute dtype
        self.bias: torch.Tensor | None = None  # of all linears [O] in the compute dtype (a group has all or none)
        self._base_bias: torch.Tensor | None = None  # the same before an adapter was loaded, where it changes them
        row, column = 0, self.in_features
        self._tails: list[torch.Tensor] = []  # where s B of each linear stands
        self.spans: list[tuple[slice, slice]] = []  # its rows, and its columns of z
        for linear, size, rank in zip(self.linears, self.sizes, self.ranks, strict=True):
            rows_here, columns_here = slice(row, row + size), slice(column, column + rank)
            linear.weight = nn.Parameter(self.matrix[rows_here, : self.in_features], requires_grad=False)
            self.spans.append((rows_here, columns_here))
            self._tails.append(self.matrix[rows_here, columns_here])
            row, column = row + size, column + rank

    @property
    def gathers(self) -> bool:
        """Whether activations outside the group are cut over the tokens."""
        return self.place.sequence_parallel and self.place.tp.size > 1

    def __call__(self, source: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """source -> y [F or T, O].

        source is x with room behind it, [T or F, I + C] (its tail is overwritten); or x alone, [T or F, I]; or gate_up
        [F, 2 I] where the group is gated.
        Column-parallel: source has this rank's T tokens, y all F. Row-parallel: source has all F, y is reduced to this
        rank's T.
        """
        if not torch.is_grad_enabled():  # nothing is kept for a backward that does not come
            return self.product(source, tokens)[0]
        return GroupedLinearFunction.apply(source, self, tokens, *self.trainables())

    def trainables(self) -> list[torch.Tensor | None]:
        """A, B and the bias of each linear, in order."""
        found = []
        for linear in self.linears:
            A = None if linear.lora_A is None else linear.lora_A.weight
            B = None if linear.lora_B is None else linear.lora_B.weight
            found += [A, B, linear.bias]
        return found

    def mask(self, tokens: Tokens) -> tuple[torch.Tensor, Dropout | None]:
        """(the tokens of the group's input on this rank, the dropout of it)."""
        offset = self.linears[0].feature_offset if self.row_parallel else 0
        return tokens.index if self.row_parallel else tokens.local, tokens.draw(self.dropout, self.site, offset)

    def product(self, source: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, the full X that it is the product of), for `source` as in the call; not for autograd.

        Under sequence parallelism the X of a column-parallel group is sure to have its z, and only until the next call.
        """
        assert self._ready, "refresh() comes before the first use"
        tp, columns = self.place.tp, self.in_features
        X, A, x = source, self.down, None
        token_index, draw = self.mask(tokens)
        if self.gated:
            X = swiglu(source, self.room) if A is None else swiglu_down(source, self.room, A, token_index, draw)
        elif A is not None:
            if source.shape[1] == columns:
                X, x = source.new_empty(source.shape[0], columns + self.room), source
            lora_down_(X, A, token_index, draw, x)
        assert X.shape[1] == columns + self.room, (X.shape, columns, self.room)
        bias = None if self.row_parallel else self.bias  # else it is added once, to the sum

        def product(rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            return matmul_nt(rows, self.matrix, bias, out)

        if not self.row_parallel:
            if self.gathers:
                return gather_product(X, product, len(self.matrix), tp, self.place.exchange, kept=columns)
            return product(X), X
        if self.gathers:
            y = product_scatter(X, product, len(self.matrix), tp, self.place.exchange)
        else:
            y = all_reduce(product(X), tp)
        return y if self.bias is None else y.add_(self.bias), X

    @torch.no_grad()
    def refresh(self) -> None:
        """Puts s B beside W, and A and the biases in the compute dtype aside. To be called after every change of an
        adapter: nothing here can notice one, since fused optimizers do not count as changes for autograd."""
        if not self._ready:
            self.matrix[:, self.in_features :].zero_()
            self._ready = True
        copies, place = [], {"dtype": self.place.dtype, "device": self.place.device}
        adapted = [linear for linear in self.linears if linear.lora_A is not None]
        for linear, tail in zip(self.linears, self._tails, strict=True):
            if linear.lora_B is not None:
                copies.append((tail, linear.lora_B.weight, linear.adapter.scaling))
        if adapted:  # a new tensor: the old one may still be in use
            self.down = torch.empty(sum(self.ranks), self.in_features, **place)
            parts = self.down.split([linear.rank for linear in adapted])
            copies += [(part, linear.lora_A.weight, 1.0) for part, linear in zip(parts, adapted, strict=True)]
        if self.linears[0].bias is not None:
            self.bias = torch.empty(sum(self.sizes), **place)
            parts = self.bias.split(self.sizes)
            copies += [(part, linear.bias, 1.0) for part, linear in zip(parts, self.linears, strict=True)]
        scaled_copy_(copies)

    def keep_base(self) -> None:
        """Before an adapter is loaded, to `switch` later: the base's own biases, where an adapter brings others."""
        biases = [linear.bias for linear in self.linears]
        if any(bias is not None and bias.requires_grad for bias in biases):
            self._base_bias = _concatenated(biases, self.place.dtype)

    @torch.no_grad()
    def switch(self, adapted: bool) -> None:
        """Generation: the branches are in force, or the base alone. After `refresh`; in place, as recorded CUDA graphs
        want it."""
        for linear, tail in zip(self.linears, self._tails, strict=True):
            if linear.lora_B is not None:
                tail.copy_(linear.lora_B.weight * linear.adapter.scaling) if adapted else tail.zero_()
        if self._base_bias is not None:
            tuned = _concatenated([linear.bias for linear in self.linears], self.place.dtype)
            self.bias.copy_(tuned if adapted else self._base_bias)


def _concatenated(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """A copy: what it was made of may change while it is in use."""
    return torch.cat([part.detach() for part in parts]).to(dtype)


class GatedPair:
    """gate and up, then down of silu(gate) * up: two groups whose backward passes are one.

    first   the column-parallel group of gate and up
    second  the row-parallel, gated one of down
    """

    def __init__(self, first: LinearGroup, second: LinearGroup):
        assert second.gated and not first.gated and sum(first.sizes) == 2 * second.in_features
        self.first, self.second = first, second

    def __call__(self, source: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """source [T, I + C] or [T, I] -> y [T, O], as of the groups one after the other."""
        if not torch.is_grad_enabled():
            return self.second.product(self.first.product(source, tokens)[0], tokens)[0]
        return GatedPairFunction.apply(source, self, tokens, *self.first.trainables(), *self.second.trainables())
