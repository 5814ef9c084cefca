"""Linears that read one input, as one matrix (docs/design.md).

q k v, gate up (column-parallel), o, down (row-parallel, alone): one matrix P = [W | s B] (see
megalora.ops.lora_linear), one dropout mask and one down-projection, one collective. A row-parallel group adds its
branch before its one reduction. Either way the branch adds no activation-sized message.
`megalora.parallel.group_grad` has the backward passes, and the functions that apply a group.

Legend: T tokens on this rank, F tokens of the full microbatch (F = T * tp under sequence parallelism, else T = F),
I in_features, O out_features of the group on this rank, R rank of its branches together, C columns of room for z.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megalora.ops.dropout import Dropout
from megalora.ops.lora_linear import lora_down_, room_for
from megalora.ops.scaled_copy import scaled_copy_
from megalora.ops.step_linear import Beside, step_down_, takes
from megalora.ops.swiglu import Made, swiglu, swiglu_down
from megalora.parallel.collectives import all_reduce
from megalora.parallel.decomposition import Decomposition
from megalora.parallel.exchange import gather_product, product_scatter
from megalora.parallel.linear import ParallelLinear, RowParallelLinear, TokenLinear
from megalora.parallel.placement import Placement, Tokens

Trainable = tuple[int, str]  # which linear of a group, and its name in ParallelLinear.trainables()


class Product(NamedTuple):
    """What a group makes of its source: y [F or T, O], the full X that it is the product of, and what DoRA keeps.

    kept  of y, for the gradients of magnitudes (see Decomposition.apply); None without DoRA
    """

    y: torch.Tensor
    X: torch.Tensor
    kept: torch.Tensor | None = None


class Factors(NamedTuple):
    """y = scale * (x W^T + own(x A^T) (s B)^T) + bias, the branch in force, in the compute dtype.

    weight W [O, I]; branch s B [O, R] and down A [R, I], None without adapters; others [F, R] the columns that are not
    a token's own, where several adapters share the branch; scale [O] of DoRA; bias [O]
    """

    weight: torch.Tensor
    branch: torch.Tensor | None
    down: torch.Tensor | None
    others: torch.Tensor | None
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    def own(self, z: torch.Tensor) -> torch.Tensor:
        """Return z [F, H, R] with zeros in the columns of other adapters."""
        return z if self.others is None else z.masked_fill(self.others.unsqueeze(1), 0.0)


class LinearGroup:
    """Linears that read one input. Owns their matrix; the parameters stay theirs.

    site     number of the input: it fixes the dropout mask, which all branches share
    made     the input is act(gate) * up of what the group is given, gate_up [T, 2 I], or act(up) of up [T, I]: made
             here, and made again in backward rather than kept; None: the input is what is given
    reduces  a row-parallel group sums its result over the tp ranks (see `product`); else it gives this rank's term, and
             whoever sums terms of several groups adds their biases. A column-parallel group that does not reduce is
             given all tokens, and the gradient of its input is this rank's term
    The group is row-parallel where its one linear is, else column-parallel; linears that are whole on every rank
    (TokenLinear) neither gather nor sum.
    """

    def __init__(
        self,
        linears: Sequence[ParallelLinear],
        site: int,
        place: Placement,
        *,
        made: Made | None = None,
        reduces: bool = True,
    ):
        self.linears, self.site, self.place, self.made = tuple(linears), site, place, made
        self.row_parallel = isinstance(linears[0], RowParallelLinear)
        self.own_tokens = isinstance(linears[0], TokenLinear)
        assert not (self.row_parallel and len(linears) > 1)
        self.reduces = reduces
        self.in_features = linears[0].local_columns
        self.sizes = [linear.local_rows for linear in linears]
        self.ranks = [linear.rank for linear in linears]
        self.room = room_for(sum(self.ranks), torch.device(place.device).type)
        self.dropout = max((linear.adapter.dropout for linear in linears if linear.adapter is not None), default=0.0)
        self.matrix = place.base.matrix(
            sum(self.sizes), self.in_features, self.room, place.dtype, place.device, rank=sum(self.ranks)
        )
        self._has_bias = any(linear.bias is not None or linear.lora_bias is not None for linear in linears)
        self._ready = self.room == 0 and not self._has_bias  # whether refresh() has been here
        self.down: torch.Tensor | None = None  # A of all branches [R, I] in the compute dtype
        self.bias: torch.Tensor | None = None  # of all linears [O] in the compute dtype
        self._base_bias: torch.Tensor | None = None  # the same before an adapter was loaded, where it changes them
        self._owners: torch.Tensor | None = None  # of several adapters: the one that each column of z [R] belongs to
        self.rows: list[slice] = []  # of each linear in the matrix
        self.branches: list[slice] = []  # its columns of z
        row = column = 0
        for linear, size, rank in zip(self.linears, self.sizes, self.ranks, strict=True):
            self.rows.append(slice(row, row + size))
            self.branches.append(slice(column, column + rank))
            linear.take_rows(self.matrix, self.rows[-1])
            row, column = row + size, column + rank
        decomposed = any(linear.magnitude is not None for linear in linears)
        self.dora = Decomposition(linears, self.rows) if decomposed else None

    @property
    def gathers(self) -> bool:
        """Whether tokens are gathered before a column-parallel product, or scattered behind a row-parallel one."""
        return self.place.gathers and self.reduces and not self.own_tokens

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that the group adds itself: all, unless whoever sums its terms does."""
        return self.bias if self.reduces or not self.row_parallel else None

    @functools.cached_property
    def trainables(self) -> dict[Trainable, torch.nn.Parameter]:
        """The factors and trained biases of all linears."""
        return {(i, name): p for i, linear in enumerate(self.linears) for name, p in linear.trainables().items()}

    def mask(self, tokens: Tokens) -> tuple[torch.Tensor, Dropout | None]:
        """Return (the tokens of the group's input on this rank, the dropout of it)."""
        first = self.linears[0]
        offset = first.feature_offset if isinstance(first, RowParallelLinear) else 0
        full = self.row_parallel or not self.reduces
        return tokens.index if full else tokens.local, tokens.draw(self.dropout, self.site, offset)

    def product(self, source: torch.Tensor, tokens: Tokens, unread: bool = False, *, made: bool = False) -> Product:
        """Return the Product of `source`. Not for autograd.

        source is x with room behind it, [T or F, I + C] (its tail is overwritten); or x alone, [T or F, I]; or what x
        is made of, gate_up [F, 2 I] or up [F, I].
        Column-parallel: source has this rank's T tokens, y all F. Row-parallel: source has all F, y is reduced to this
        rank's T (or is this rank's term of all F, where the group does not reduce).
        Under sequence parallelism the X of a column-parallel group is sure to have its z, and only until the next call.
        unread: nobody reads y but DoRA, without which its values are any; the group is row-parallel.
        made: source is x, where the group would make x of it.
        """
        assert self._ready, "refresh() comes before the first use"
        tp, columns, exchange = self.place.tp, self.in_features, self.place.exchange
        X, A, x = source, self.down, None
        token_index, draw = self.mask(tokens)
        maker = None if made else self.made
        if maker is not None and A is None:
            X = swiglu(source, self.room, *maker)
        elif maker is not None:
            X = swiglu_down(source, self.room, A, token_index, draw, maker.act)
        elif A is not None:
            if source.shape[1] == columns:
                X, x = source.new_empty(source.shape[0], columns + self.room), source
            lora_down_(X, A, token_index, draw, x)
        assert X.shape[1] == columns + self.room, (X.shape, columns, self.room)
        self._hide_others(X, tokens)
        if unread and self.dora is None:
            assert self.row_parallel
            rows = X.shape[0] // (tp.size if self.gathers else 1)
            return Product(X.new_empty(1).expand(rows, self.matrix.rows), X)
        # Of a row-parallel group of several ranks it is added once, to the sum; with DoRA behind the factors.
        sums = self.row_parallel and tp.size > 1
        bias = None if sums or self.dora is not None else self.own_bias

        product = self.matrix.multiplier(bias)
        if not self.row_parallel and self.gathers:
            y, X = gather_product(X, product, self.matrix.rows, tp, exchange, kept=columns)
        elif not self.row_parallel or not self.reduces:
            y = product(X)
        elif self.gathers:
            y = product_scatter(X, product, self.matrix.rows, tp, exchange)
        else:
            y = all_reduce(product(X), tp)
        if self.dora is not None:
            y, kept = self.dora.apply(y, self.own_bias)
            return Product(y, X, kept)
        if sums and self.own_bias is not None:
            y.add_(self.own_bias)
        return Product(y, X)

    def step(self, x: torch.Tensor, beside: Beside, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (x + delta [T, I], y) as megalora.ops.step_linear says, of a step of generation; None where no kernels
        do what is beside the product, or the group does more: collectives, DoRA's factors.

        x  with room for z behind it where nothing is normed
        """
        assert self._ready, "refresh() comes before the first use"
        if self.dora is not None or self.place.tp.size > 1:
            return None
        if self.down is None:
            if not self.matrix.takes_beside(x, beside):
                return None
            return self.matrix.multiply_beside(x, self.own_bias, beside)
        if beside.norm is None or self.mask(tokens)[1] is not None or not takes(x, beside):
            return None
        X = x.new_empty(len(x), self.in_features + self.room)
        total = step_down_(x, self.down, beside, X)
        self._hide_others(X, tokens)
        opens = Beside(act=beside.act)
        if beside.act is None:
            return total, self.matrix.multiply(X, self.own_bias)
        if self.matrix.takes_beside(X, opens):
            return total, self.matrix.multiply_beside(X, self.own_bias, opens)[1]
        return total, swiglu(self.matrix.multiply(X, self.own_bias), 0, beside.act)

    def _hide_others(self, X: torch.Tensor, tokens: Tokens) -> None:
        """Set the columns of z to zero that are not of a token's own adapter, where several share the branch."""
        if tokens.adapters is not None and self._owners is not None:
            z = X[:, self.in_features : self.in_features + len(self._owners)]
            z.masked_fill_(self._owners != tokens.adapters.unsqueeze(1), 0.0)

    def fill_room(self, X: torch.Tensor, tokens: Tokens) -> None:
        """Put z behind x [T or F, I + C], in place, as `product` does."""
        if self.down is not None:
            lora_down_(X, self.down, *self.mask(tokens))

    @torch.no_grad()
    def refresh(self, in_place: bool = False) -> None:
        """Put s B beside W, and A and the biases in the compute dtype aside.

        in_place  into the tensors that are there, as recorded CUDA graphs of generation want it
        Call after every change of an adapter: nothing here can notice one, since fused optimizers do not count as
        changes for autograd.
        """
        if not self._ready:
            self.matrix.clear_branch()
            self._ready = True
        copies: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        place: dict[str, Any] = {"dtype": self.place.dtype, "device": self.place.device}
        adapted = [linear for linear in self.linears if linear.lora_A is not None]
        for linear, tail in zip(self.linears, self._tails(), strict=True):
            if linear.lora_B is not None:
                copies.append((tail, linear.lora_B.weight, linear.adapter.scaling))
        if adapted:
            if self.down is None or not in_place:  # a new tensor: the old one may still be in use
                self.down = torch.empty(sum(self.ranks), self.in_features, **place)
            parts = self.down.split([linear.rank for linear in adapted])
            copies += [(part, linear.lora_A.weight, 1.0) for part, linear in zip(parts, adapted, strict=True)]
        if self._has_bias:
            self.bias = torch.zeros(sum(self.sizes), **place)  # a linear may lack what another has
            parts = self.bias.split(self.sizes)
            copies += [(p, one.bias, 1.0) for p, one in zip(parts, self.linears, strict=True) if one.bias is not None]
        scaled_copy_(copies)
        self.matrix.branch_written()
        if any(linear.lora_bias is not None for linear in self.linears):
            self.bias.copy_(self._biases(adapted=True))

    def _tails(self) -> list[torch.Tensor]:
        """Return where s B of each linear stands."""
        return [self.matrix.branch(rows, columns) for rows, columns in zip(self.rows, self.branches, strict=True)]

    def share(self, owners: Mapping[str, Sequence[int]]) -> None:
        """Let several adapters share the branches: each token is given the columns of its own (see Tokens.adapters).

        owners  by the name of an adapted linear, which adapter (from 1) each column of its branch belongs to
        """
        assert not self.place.gathers, "adapters share branches in generation, where tokens are not sharded"
        columns = [owner for linear in self.linears if linear.rank for owner in owners[linear.name]]
        assert len(columns) == sum(self.ranks)
        self._owners = torch.tensor(columns, device=self.place.device) if columns else None

    def factors(self, tokens: Tokens) -> Factors:
        """Return what the group multiplies `tokens` by, for whoever moves the product elsewhere."""
        rows, columns = slice(0, sum(self.sizes)), slice(0, sum(self.ranks))
        branch = None if self.down is None else self.matrix.branch(rows, columns)
        others = None
        if tokens.adapters is not None and self._owners is not None:
            others = self._owners != tokens.adapters.unsqueeze(1)
        scale = None if self.dora is None else self.dora.scale
        return Factors(self.matrix.weight(rows), branch, self.down, others, scale, self.own_bias)

    def keep_base(self) -> None:
        """Keep the base's own biases, to `switch` later, where an adapter brings others. Call before it is loaded."""
        trained = (linear.bias is not None and linear.bias.requires_grad for linear in self.linears)
        if any(trained) or any(linear.lora_bias is not None for linear in self.linears):
            self._base_bias = self._biases(adapted=False)

    @torch.no_grad()
    def switch(self, adapted: bool) -> None:
        """Put the branches in force, or the base alone (generation). After `refresh`; in place, as recorded CUDA graphs
        want it."""
        for linear, tail in zip(self.linears, self._tails(), strict=True):
            if linear.lora_B is not None:
                tail.copy_(linear.lora_B.weight * linear.adapter.scaling) if adapted else tail.zero_()
        self.matrix.branch_written()
        if self.dora is not None:
            self.dora.switch(adapted)
        if self._base_bias is not None:
            self.bias.copy_(self._biases(adapted=True) if adapted else self._base_bias)

    def _biases(self, adapted: bool) -> torch.Tensor:
        """Return a copy of all biases [O] in the compute dtype, 0 where a linear has none; adapted: with those of B."""
        parts = []
        for linear, size in zip(self.linears, self.sizes, strict=True):
            place: dict[str, Any] = {"dtype": self.place.master_dtype, "device": self.place.device}
            whole = torch.zeros(size, **place) if linear.bias is None else linear.bias.detach().to(**place)
            if adapted and linear.lora_bias is not None:
                whole = whole + linear.adapter.scaling * linear.lora_bias.detach()
            parts.append(whole)
        return torch.cat(parts).to(self.place.dtype)


class MLPPair:
    """gate and up (or up alone), then down of what is made of them: two groups whose backward passes are one.

    first   the column-parallel group of gate and up
    second  the row-parallel one of down, which makes its input
    """

    def __init__(self, first: LinearGroup, second: LinearGroup):
        assert second.made is not None and first.made is None
        assert sum(first.sizes) == second.made.width(second.in_features)
        self.first, self.second = first, second
