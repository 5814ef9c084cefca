"""Column- and row-parallel linears: the parameters of one frozen linear on this rank, with those of its adapter
(docs/design.md). A LinearGroup (megalora.parallel.group) applies them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from megalora.adapters.lora import Adapter, initial_factor
from megalora.parallel.base import FrozenMatrix, WeightSource
from megalora.parallel.placement import Placement
from megalora.parallel.split import Cut, Part, Split, whole_split

MAGNITUDE = "lora_magnitude_vector"  # peft's name


class LoraFactor(nn.Module):
    """One factor of a branch: `weight`, and `bias` where it has one; trainable masters."""

    def __init__(self, shape: tuple[int, ...], place: Placement, bias: bool = False):
        super().__init__()
        place_of: dict[str, Any] = {"dtype": place.master_dtype, "device": place.device}
        self.weight = nn.Parameter(torch.empty(shape, **place_of))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], **place_of)) if bias else None)


class AdapterSplits(NamedTuple):
    """Where the trained parameters of an adapter lie: lora_A, lora_B, and vectors of out_features.

    vector     of a bias of lora_B
    magnitude  of DoRA
    """

    lora_A: Split
    lora_B: Split
    vector: Split
    magnitude: Split


class ParallelLinear(nn.Module):
    """The parameters of one frozen linear on this rank, by their HF names, with its adapter.

    weight      [O_i, I], or [I, O_i] where the file has it transposed: a view of its group's matrix, given by the
                group; None where that holds it quantised
    name        full name in the model: the initial adapter is drawn from it
    local_rows, local_columns  of the linear on this rank, [O_i, I] whichever way the file stores it
    """

    def __init__(
        self,
        name: str,
        weight_split: Split,
        bias_split: Split | None,
        adapter_splits: AdapterSplits,
        adapter: Adapter | None,
        trains_bias: bool,
        transposed: bool,
        place: Placement,
    ):
        super().__init__()
        self.name, self.adapter, self.transposed = name, adapter, transposed
        self._splits = {"weight": weight_split}
        self.local_rows, self.local_columns = weight_split.local_shape[::-1] if transposed else weight_split.local_shape
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if bias_split is not None:
            self._splits["bias"] = bias_split
            dtype = place.master_dtype if trains_bias else place.dtype
            bias = torch.empty(bias_split.local_shape, dtype=dtype, device=place.device)
            self.bias = nn.Parameter(bias, requires_grad=trains_bias)
        self.lora_A: LoraFactor | None = None
        self.lora_B: LoraFactor | None = None
        self.register_parameter(MAGNITUDE, None)
        if adapter is not None:
            self._splits["lora_A.weight"], self._splits["lora_B.weight"] = adapter_splits[:2]
            self.lora_A = LoraFactor(adapter_splits.lora_A.local_shape, place)
            self.lora_B = LoraFactor(adapter_splits.lora_B.local_shape, place, adapter.bias)
            if adapter.bias:
                self._splits["lora_B.bias"] = adapter_splits.vector
            if adapter.dora:
                self._splits[MAGNITUDE] = adapter_splits.magnitude
                shape = adapter_splits.magnitude.local_shape
                vector = torch.empty(shape, dtype=place.master_dtype, device=place.device)
                self.register_parameter(MAGNITUDE, nn.Parameter(vector))

    def shard_dims(self) -> dict[str, Split]:
        """Return how each parameter is cut: the one place that loading, saving and gradient reduction read."""
        return self._splits

    def take_rows(self, matrix: FrozenMatrix, rows: slice) -> None:
        """Take `rows` of the group's matrix as the linear's weight; register them as `weight` where they are dense."""
        self._matrix, self._rows = matrix, rows
        view = matrix.view(rows)
        if view is not None:
            self.weight = nn.Parameter(view.t() if self.transposed else view, requires_grad=False)

    @torch.no_grad()
    def fill_weight(self, source: WeightSource) -> None:
        """Set the weight to this rank's part of `source`, quantised where the matrix is."""
        self._matrix.fill(self._rows, source, self._splits["weight"], self.transposed)

    def borrow(self, key: str, factor: LoraFactor) -> None:
        """Use another module's factor as its own lora_A or lora_B (`key`), which it gives up."""
        delattr(self, key)
        del self._splits[f"{key}.weight"]
        object.__setattr__(self, key, factor)  # not as a module of its own

    @property
    def rank(self) -> int:
        return 0 if self.adapter is None else self.adapter.r

    def trainables(self) -> dict[str, nn.Parameter]:
        """Return what is trained of this linear, by name: lora_A, lora_B, lora_bias, magnitude, bias."""
        found = {} if self.lora_A is None else {"lora_A": self.lora_A.weight, "lora_B": self.lora_B.weight}
        if self.lora_bias is not None:
            found["lora_bias"] = self.lora_bias
        if self.magnitude is not None:
            found["magnitude"] = self.magnitude
        if self.bias is not None and self.bias.requires_grad:
            found["bias"] = self.bias
        return found

    @property
    def magnitude(self) -> nn.Parameter | None:
        """m [O_i] of DoRA."""
        return cast("nn.Parameter | None", getattr(self, MAGNITUDE))

    @property
    def lora_bias(self) -> nn.Parameter | None:
        """The bias [O_i] of lora_B."""
        bias = None if self.lora_B is None else self.lora_B.bias
        return cast("nn.Parameter | None", bias)

    @torch.no_grad()
    def reset_adapter(self, seed: int, init_lora_weights: bool | str) -> None:
        """Fill the adapter with its initial values, the same on every layout; all but magnitudes (`Stage.settle`)."""
        if self.adapter is None:
            return
        for key, factor in (("lora_A.weight", self.lora_A), ("lora_B.weight", self.lora_B)):
            if key not in self._splits:  # another module holds it
                continue
            split = self._splits[key]
            whole = initial_factor(f"{self.name}.{key}", split.global_shape, seed, init_lora_weights, self.adapter.r)
            factor.weight.copy_(split.slice(whole))
        if self.lora_bias is not None:
            self.lora_bias.zero_()


def _weight_split(cut: Cut, shape: tuple[int, int], dim: int, transposed: bool) -> Split:
    """Return the Split of a weight [out, in] cut along `dim`, as the file stores it."""
    return cut.split(shape[::-1], 1 - dim) if transposed else cut.split(shape, dim)


class ColumnParallelLinear(ParallelLinear):
    """y_i = x W_i^T + b_i + s (dropout(x) A^T) B_i^T: W, b, B cut on out_features, A whole.

    cut  this rank's out_features; ranks may share some (KV heads that the query heads of several ranks read)
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        cut: Cut | Part,
        *,
        bias: bool,
        adapter: Adapter | None,
        trains_bias: bool,
        place: Placement,
        transposed: bool = False,
    ):
        r = 0 if adapter is None else adapter.r
        cut = cut.cut() if isinstance(cut, Part) else cut
        super().__init__(
            name,
            _weight_split(cut, (out_features, in_features), 0, transposed),
            cut.split((out_features,), 0) if bias else None,
            # dz_i = s dy_i B_i, so dA_i is one term of the sum over tp.
            AdapterSplits(
                whole_split((r, in_features), place.tp, partial_grad=True),
                cut.split((out_features, r), 0),
                cut.split((out_features,), 0),
                cut.split((out_features,), 0),
            ),
            adapter,
            trains_bias,
            transposed,
            place,
        )


class WholeLinear(ParallelLinear):
    """A linear that a rank holds whole: `split` says who else does, and whether gradients are terms of a sum."""

    @staticmethod
    def split(shape: tuple[int, ...], place: Placement, trained: bool) -> Split:
        """Return where a tensor of this whole shape lies; trained: it gets a gradient."""
        raise NotImplementedError

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        adapter: Adapter | None,
        trains_bias: bool,
        place: Placement,
        transposed: bool = False,
    ):
        def trained(*shape: int) -> Split:
            return self.split(shape, place, True)

        r = 0 if adapter is None else adapter.r
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        factors = trained(r, in_features), trained(out_features, r)
        super().__init__(
            name,
            self.split(shape, place, False),
            trained(out_features) if bias else None,
            AdapterSplits(*factors, trained(out_features), trained(out_features)),
            adapter,
            trains_bias,
            transposed,
            place,
        )


class TokenLinear(WholeLinear):
    """y = x W^T + s (dropout(x) A^T) B^T + b of a rank's own tokens, whole on every rank.

    Without sequence parallelism every rank computes the same, gradients included; with it each its own tokens, and
    gradients are terms of a sum over tp.
    """

    @staticmethod
    def split(shape: tuple[int, ...], place: Placement, trained: bool) -> Split:
        """Return that all ranks have it."""
        return whole_split(shape, place.tp, partial_grad=trained and place.gathers)


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
        transposed: bool = False,
    ):
        assert not part.shared, name
        r, cut = 0 if adapter is None else adapter.r, part.cut()
        super().__init__(
            name,
            _weight_split(cut, (out_features, in_features), 1, transposed),
            whole_split((out_features,), place.tp) if bias else None,
            # z_i is one term of a sum, and so is dB_i = s dy^T z_i; a magnitude is reduced from the tokens of a rank.
            AdapterSplits(
                cut.split((r, in_features), 1),
                whole_split((out_features, r), place.tp, partial_grad=True),
                whole_split((out_features,), place.tp),
                whole_split((out_features,), place.tp, partial_grad=True),
            ),
            adapter,
            trains_bias,
            transposed,
            place,
        )
        self.feature_offset = part.start
