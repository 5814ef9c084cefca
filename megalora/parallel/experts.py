"""The linears of a layer's experts: whole experts on each tensor-parallel rank, all of one kind in one stacked matrix.

gate and up of all of a rank's experts are one group, down is another: P [E, O, I + C] = [W_e | s B_e], one grouped
product for all tokens (megalora.ops.grouped). The parameters stay those of each expert, by its names in the file.
`megalora.parallel.experts_grad` applies the groups.

Legend: M rows (pairs of token and expert), E experts of this rank, I in_features, O out_features of the group, R rank
of its branches together, C columns of room for z.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import nn

from megalora.adapters.lora import initial_factor
from megalora.errors import UserError
from megalora.ops import limits
from megalora.ops.dispatched import Rows, branch_, dispatch_nt, gate_nt, outer_, rows_of
from megalora.ops.dropout import Dropout, dropout
from megalora.ops.grouped import Bounds, BranchGrad, grouped, grouped_nt
from megalora.ops.lora_linear import room_for
from megalora.ops.routing import Routes, dispatch
from megalora.ops.scaled_copy import scaled_copy_
from megalora.ops.weighted_gate import Gate
from megalora.parallel.expert_matrices import expert_matrices
from megalora.parallel.linear import LoraFactor, ParallelLinear, WholeLinear
from megalora.parallel.placement import Placement, Tokens
from megalora.parallel.split import Split, whole_split

_COLUMNS_OF_Z = 16  # a multiple of which is kept
_NOBODY = -1  # the owner of columns that fill a branch up to the rank of the largest


class ExpertLinear(WholeLinear):
    """A linear of one expert, whole on the one rank that has the expert: other ranks do not know it."""

    @staticmethod
    def split(shape: tuple[int, ...], place: Placement, trained: bool) -> Split:
        """Return that this rank alone has it."""
        return Split.range(shape, 0, 0, shape[0])


class ReplicatedLinear(WholeLinear):
    """A linear that every tp rank holds whole and computes for all tokens, of which each uses its own experts' part: so
    every gradient is one term of a sum over tp."""

    @staticmethod
    def split(shape: tuple[int, ...], place: Placement, trained: bool) -> Split:
        """Return that all ranks have it."""
        return whole_split(shape, place.tp, partial_grad=trained)


class SharedFactors(nn.Module):
    """Factors that the same linears of all experts of a layer share: every tp rank has them, and adds up the gradients
    of its own experts, so that each gradient is one term of a sum over tp.

    name     the initial values are drawn from it
    linears  of this rank's experts, which use these factors instead of their own; factors: "A" or "AB"
    """

    def __init__(self, name: str, linears: Sequence[ParallelLinear], factors: str, place: Placement):
        super().__init__()
        first = linears[0]
        assert first.adapter is not None
        self.name, self.r = name, first.adapter.r
        shapes = {"A": (self.r, first.local_columns), "B": (first.local_rows, self.r)}
        self._splits = {
            f"lora_{factor}.weight": whole_split(shapes[factor], place.tp, partial_grad=True) for factor in factors
        }
        for factor in factors:
            key, made = f"lora_{factor}", LoraFactor(shapes[factor], place)
            self.add_module(key, made)
            for linear in linears:
                linear.borrow(key, made)

    def shard_dims(self) -> dict[str, Split]:
        return self._splits

    @torch.no_grad()
    def reset_adapter(self, seed: int, init_lora_weights: bool | str) -> None:
        """Fill the factors with their initial values, the same on every layout."""
        for key, split in self._splits.items():
            whole = initial_factor(f"{self.name}.{key}", split.global_shape, seed, init_lora_weights, self.r)
            self.get_parameter(key).copy_(whole)


def share_storage(linears: Sequence[ParallelLinear]) -> None:
    """Move the factors of `linears` into one tensor, in order: then one operation can read those of all experts."""
    parameters = list(dict.fromkeys(p for linear in linears for p in linear.trainables().values()))
    if not parameters:
        return
    flat = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return `tensors` of one shape as one view [n, ...] of the memory they lie in; None where they lie unevenly."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    step, rest = divmod(tensors[1].data_ptr() - first.data_ptr(), first.itemsize)
    even = (
        step > 0
        and rest == 0
        and all(
            tensor.shape == first.shape
            and tensor.is_contiguous()
            and tensor.data_ptr() == first.data_ptr() + i * step * first.itemsize
            and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            for i, tensor in enumerate(tensors)
        )
    )
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride())) if even else None


class _Stacks:
    """Views [n, ...] of tensors that lie one behind another, by a key.

    Hundreds of experts take the host a millisecond to look at: while the ends lie where they did, so do the others.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[list[int], torch.Tensor | None]] = {}

    def of(self, key: Hashable, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """Return `tensors` as one view; None where one is missing, they lie apart, or all are the same one."""
        first, last = tensors[0], tensors[-1]
        if first is None or last is None or (len(tensors) > 1 and tensors[1] is first):
            return None
        ends = [first.data_ptr(), last.data_ptr()]
        if key not in self._known or self._known[key][0] != ends:
            present = [tensor.detach() for tensor in tensors if tensor is not None]
            self._known[key] = ends, stacked(present) if len(present) == len(tensors) else None
        return self._known[key][1]


class ExpertGroup:
    """Linears of all of a rank's experts that read one input: [gate, up] or [down] of each. Owns their matrix.

    experts  of each expert its linears, alike in shape; ranks of adapters may differ (then padded with zeros)
    site     number of the input, as of a LinearGroup
    """

    def __init__(self, experts: Sequence[Sequence[ParallelLinear]], site: int, place: Placement):
        self.experts, self.site, self.place = [tuple(linears) for linears in experts], site, place
        first = self.experts[0]
        self.in_features, self.sizes = first[0].local_columns, [linear.local_rows for linear in first]
        self.parts = list(zip(*self.experts, strict=True))  # of each kind of linear, those of all experts
        device_type = torch.device(place.device).type
        self.ranks = [padded_rank(max(linear.rank for linear in part), device_type) for part in self.parts]
        self.rank = sum(self.ranks)
        self.room = room_for(self.rank, device_type)
        adapters = [linear.adapter for linear in self.linears if linear.adapter is not None]
        asked = {"use_dora": any(one.dora for one in adapters), "lora_bias": any(one.bias for one in adapters)}
        for field in (field for field, found in asked.items() if found):
            said = f"lora_config: {field} is not implemented for the linears of experts"
            raise UserError(said, "leave it out, or name other target_modules")
        if any(linear.bias is not None and linear.bias.requires_grad for linear in self.linears):
            raise UserError("lora_config: biases of experts cannot be trained", 'set bias to "none"')
        self.dropout = max((adapter.dropout for adapter in adapters), default=0.0)
        count, self.output = len(self.experts), sum(self.sizes)
        self.matrix = expert_matrices(place, count, self.output, self.in_features, self.room)
        self.down: torch.Tensor | None = None  # A of all branches [E, R, I] in the compute dtype
        self.bias: torch.Tensor | None = None  # [E, O] in the compute dtype
        self._owners: torch.Tensor | None = None  # of several adapters: the one of each column of z, [E or 1, R]
        self._ready = False
        self._stacked, self._gradients = _Stacks(), _Stacks()
        self.rows = _ranges(self.sizes)
        self.branches = _ranges(self.ranks)
        for expert, linears in enumerate(self.experts):
            for linear, rows in zip(linears, self.rows, strict=True):
                linear.take_rows(self.matrix.of(expert), rows)

    @property
    def linears(self) -> list[ParallelLinear]:
        return [linear for linears in self.experts for linear in linears]

    @property
    def biased(self) -> bool:
        return self.experts[0][0].bias is not None

    @torch.no_grad()
    def refresh(self, in_place: bool = False) -> None:
        """Put s B_e beside W_e, and A in the compute dtype aside: as `LinearGroup.refresh`."""
        if not self._ready:
            self.matrix.branch.zero_()
            if self.rank:
                shape = len(self.experts), self.rank, self.in_features
                self.down = torch.zeros(shape, dtype=self.place.dtype, device=self.place.device)
            self._ready = True
        if self.down is not None and not in_place:
            self.down = torch.zeros_like(self.down)  # a new tensor: the old one may still be in use
        for part, (rows, columns) in enumerate(zip(self.rows, self.branches, strict=True)):
            if self.down is not None:
                self._put(self.down[:, columns], part, "lora_A")
            self._put(self._tail(rows, columns), part, "lora_B")
        biased = [[linear.bias for linear in linears] for linears in self.experts]
        if biased[0][0] is not None and not (in_place and self.bias is not None):  # no adapter changes them
            self.bias = torch.stack([torch.cat([b.detach() for b in row]).to(self.place.dtype) for row in biased])

    def _tail(self, rows: slice, columns: slice) -> torch.Tensor:
        return self.matrix.branch[:, rows, columns]

    def share(self, owners: Mapping[str, Sequence[int]]) -> None:
        """Let several adapters share the branches, as `LinearGroup.share`."""
        if not self.rank:
            return
        rows = []
        for linears in self.experts:
            columns: list[int] = []
            for linear, rank in zip(linears, self.ranks, strict=True):
                own = owners[linear.name] if linear.rank else []
                columns += [*own, *[_NOBODY] * (rank - len(own))]
            rows.append(columns)
        if all(columns == rows[0] for columns in rows):
            del rows[1:]
        self._owners = torch.tensor(rows, device=self.place.device)

    def keep_base(self) -> None:
        """Do nothing, for nothing of the base changes: biases of experts are not trained."""

    @torch.no_grad()
    def switch(self, adapted: bool) -> None:
        """Put the branches in force, or the base alone, in place. After `refresh`."""
        for part, (rows, columns) in enumerate(zip(self.rows, self.branches, strict=True)):
            tail = self._tail(rows, columns)
            self._put(tail, part, "lora_B") if adapted else tail.zero_()

    def _put(self, places: torch.Tensor, part: int, name: str) -> None:
        """Copy a factor of each expert, B times s, to its place [E, ...]; a smaller rank leaves zeros."""
        weights, scale = self._trained[part, name], self._scaling(part) if name == "lora_B" else 1.0
        whole = self._stacked.of((part, name), weights)
        if whole is not None and whole.shape == places.shape and isinstance(scale, float):
            places.copy_(whole if scale == 1.0 else whole * scale)
            return
        scales = self._scales(part) if name == "lora_B" else [1.0] * len(weights)
        present = [(place, w, s) for place, w, s in zip(places, weights, scales, strict=True) if w is not None]
        scaled_copy_([(place[: w.shape[0], : w.shape[1]], w.detach(), s) for place, w, s in present])

    @functools.cache  # noqa: B019 (a group lives as long as its stage)
    def _scaling(self, part: int) -> float | torch.Tensor:
        """Return s of the linears of a part: one number, or [E, 1, 1] where they differ."""
        scales = self._scales(part)
        if len(set(scales)) == 1:
            return scales[0]
        return torch.tensor(scales, dtype=self.place.master_dtype, device=self.place.device)[:, None, None]

    def _scales(self, part: int) -> list[float]:
        return [0.0 if linear.adapter is None else linear.adapter.scaling for linear in self.parts[part]]

    @functools.cached_property
    def _trained(self) -> dict[tuple[int, str], list[nn.Parameter | None]]:
        """Of each part and factor the parameters of all experts; None where one has none."""
        found = {}
        for i, part in enumerate(self.parts):
            for name in ("lora_A", "lora_B"):
                found[i, name] = [None if linear.adapter is None else getattr(linear, name).weight for linear in part]
        return found

    @functools.cached_property
    def anchor(self) -> nn.Parameter | None:
        """One of the factors, for autograd to see that the group trains; None where it does not."""
        return next((w for weights in self._trained.values() for w in weights if w is not None), None)

    def draw(self, tokens: Tokens) -> Dropout | None:
        """Return the dropout of the group's input."""
        return tokens.draw(self.dropout, self.site)

    def dispatch(self, x: torch.Tensor, routes: Routes, index: torch.Tensor | None, tokens: Tokens) -> torch.Tensor:
        """Return the token of each row of x [F, I] with z = dropout(x) A_e^T behind it, [M, I + C].

        z is 0 in columns of other adapters than a row's own. index [M] int64, what dropout is drawn from, where it is
        """
        if self.down is None or self.draw(tokens) is not None:
            return self._project(dispatch(x, routes, self.in_features, self.room), routes, index, tokens)
        return self._own(dispatch_nt(x, self.down, routes, self.room), routes, tokens)

    def gated(
        self,
        gate: Gate,
        gate_up: torch.Tensor,
        weights: torch.Tensor,
        routes: Routes,
        index: torch.Tensor | None,
        tokens: Tokens,
    ) -> torch.Tensor:
        """Return what `gate` makes of gate_up [M, 2 I] and weights [F, k], with z behind it: as `dispatch` does."""
        if self.down is None or self.draw(tokens) is not None:
            return self._project(gate.forward(gate_up, weights, routes, self.room), routes, index, tokens)
        return self._own(gate_nt(gate, gate_up, weights, self.down, routes, self.room), routes, tokens)

    def _project(self, X: torch.Tensor, routes: Routes, index: torch.Tensor | None, tokens: Tokens) -> torch.Tensor:
        """Write z behind x, in place: X [M, I + C], which is returned."""
        if self.down is None:
            return X
        x, z = X[:, : self.in_features], X[:, self.in_features :]
        grouped_nt(dropped(x, index, self.draw(tokens)), self.down, routes.bounds, out=z)
        return self._own(X, routes, tokens)

    def _own(self, X: torch.Tensor, routes: Routes, tokens: Tokens) -> torch.Tensor:
        """Write 0 into columns of other adapters than a row's own, in z of X [M, I + C], which is returned."""
        if tokens.adapters is not None and self._owners is not None:
            owners = self._owners if len(self._owners) == 1 else self._owners[self._held(routes.expert)]
            z = X[:, self.in_features : self.in_features + self.rank]
            z.masked_fill_(owners != tokens.adapters[routes.token, None], 0.0)
        return X

    def z_of(self, X: torch.Tensor) -> torch.Tensor:
        """Return a copy of z of X [M, I + C] for backward, [M, R or more]: rows of `kept_columns`."""
        return X[:, self.in_features : self.in_features + kept_columns(self.rank, self.room)].clone()

    def multiply(
        self, X: torch.Tensor, bounds: Bounds, expert: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return X P_e^T + w b_e [M, O] for X [M, I + C]; expert [M] int64, weights [M, 1], 1 where there are none."""
        assert self._ready, "refresh() comes before the first use"
        y = self.matrix.multiply(X, bounds)
        if self.bias is None:
            return y
        return y.add_(self.bias_of(expert)) if weights is None else y.addcmul_(self.bias_of(expert), weights)

    def bias_of(self, expert: torch.Tensor) -> torch.Tensor:
        """Return the bias of each row's expert [M, O], in the compute dtype."""
        assert self.bias is not None
        return self.bias[self._held(expert)]

    def _held(self, expert: torch.Tensor) -> torch.Tensor:
        """Return `expert` with one of this rank's for rows that belong to none, which nobody reads."""
        return expert.clamp(max=len(self.experts) - 1)

    def branch_transposed(self, dy: Rows, bounds: Bounds, z: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (dy [M, O], dz = dy s B_e [M, R]); with z [M, R or more], add s dy_e^T z_e to the gradient of each
        B_e.
        """
        B = self.matrix.branch[:, :, : self.rank]
        grads = None if z is None else self._whole_gradients_of_b()
        if z is not None and grads is not None:
            return branch_(grads, dy, z[:, : self.rank], B, bounds)
        dy = rows_of(dy)
        if z is not None:
            self._add_up_grads(dy, z, bounds)
        return dy, grouped(dy, B, bounds)

    def _whole_gradients_of_b(self) -> list[BranchGrad] | None:
        """Return the gradients of the parts' B where each part has one of all experts, else None."""
        grads = []
        for i, (rows, columns) in enumerate(zip(self.rows, self.branches, strict=True)):
            out, scale = self._gradient(i, "lora_B") if self.ranks[i] else None, self._scaling(i)
            sizes = rows.stop - rows.start, columns.stop - columns.start
            if out is None or not isinstance(scale, float) or out.shape[1:] != sizes:
                return None
            grads.append(BranchGrad(out, rows, columns, scale))
        return grads

    def multiply_transposed(
        self, dy: torch.Tensor, bounds: Bounds, dz: torch.Tensor | None = None, A: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return dy W_e + dz A_e [M, I]; without dz and A the first alone."""
        return self.matrix.multiply_transposed(dy, bounds, dz, A)

    def _add_up_grads(self, dy: torch.Tensor, z: torch.Tensor, bounds: Bounds) -> None:
        """Add s dy_e^T z_e to the gradient of each B_e: dy [M, O], z [M, R]."""
        for i, (rows, columns) in enumerate(zip(self.rows, self.branches, strict=True)):
            if self.ranks[i]:
                self._add([(i, "lora_B")], dy[:, rows], z[:, columns], bounds, self._scaling(i))

    def add_down_grads(self, dz: torch.Tensor, x_dropped: Rows, bounds: Bounds) -> None:
        """Add dz_e^T x_e to the gradient of each A_e: dz [M, R], x_dropped [M, I]."""
        factors = [(i, "lora_A") for i, rank in enumerate(self.ranks) if rank]
        self._add(factors, dz, x_dropped, bounds, 1.0)

    def _add(
        self,
        factors: Sequence[tuple[int, str]],
        a: torch.Tensor,
        b: Rows,
        bounds: Bounds,
        scale: float | torch.Tensor,
    ) -> None:
        """Add scale a_e^T b_e [E, N, K] to the gradients of the factors (part, name) of all experts that want one.

        The rows of several factors stand below one another in it.
        """
        sizes = [a.shape[1]] if len(factors) == 1 else [self.ranks[part] for part, _ in factors]
        places = [self._gradient(part, name) for part, name in factors]
        whole = [
            place
            for place, size in zip(places, sizes, strict=True)
            if place is not None and place.shape[1:] == (size, b.shape[1])
        ]
        if len(whole) == len(factors) and isinstance(scale, float):
            outer_(whole, a, b, bounds, scale)
            return
        made = torch.zeros(
            len(self.experts), a.shape[1], b.shape[1], dtype=self.place.master_dtype, device=self.place.device
        )
        outer_([made], a, b, bounds)
        for (part, name), grads in zip(factors, made.mul_(scale).split(sizes, 1), strict=True):
            self._add_each(part, name, grads)

    def _gradient(self, part: int, name: str) -> torch.Tensor | None:
        """Return the gradients of a factor of all experts as one view [E, ...], made where there are none; None where
        they lie apart, or are those of one that all experts share.
        """
        weights = self._trained[part, name]
        for weight in weights:
            if weight is not None and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        grads = [None if weight is None else weight.grad for weight in weights]
        return self._gradients.of((part, name), grads)

    def _add_each(self, part: int, name: str, grads: torch.Tensor) -> None:
        """Add grads [E, ...] to the gradient of the factor `name` of each linear of a part, where it wants one."""
        weights = self._trained[part, name]
        first = weights[0]
        if first is not None and len(weights) > 1 and weights[1] is first:  # all experts share it
            first.grad.add_(grads[:, : first.shape[0], : first.shape[1]].sum(0))
            return
        for weight, grad in zip(weights, grads, strict=True):
            if weight is not None:
                weight.grad.add_(grad[: weight.shape[0], : weight.shape[1]])


def dropped(x: torch.Tensor, index: torch.Tensor | None, draw: Dropout | None) -> torch.Tensor:
    """Return dropout(x), or x where nothing is dropped."""
    if draw is None:
        return x
    assert index is not None
    return dropout(x, index, draw)


def padded_rank(rank: int, device_type: str) -> int:
    """Return the columns that a branch of `rank` takes: grouped GEMMs of a GPU want rows on 16 bytes."""
    return -(-rank // limits.OCTET) * limits.OCTET if device_type == "cuda" else rank


def kept_columns(rank: int, room: int) -> int:
    """Return the columns of z that are kept, of its room: Triton wants rows of 16 numbers to read many at once."""
    return min(room, -(-rank // _COLUMNS_OF_Z) * _COLUMNS_OF_Z)


def _ranges(sizes: Sequence[int]) -> list[slice]:
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
