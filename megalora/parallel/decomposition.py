"""DoRA on a group of linears (see megalora.adapters.dora): factors of the columns of its product X P^T.

Norms are taken once for all microbatches of a step, where the adapters are brought into the compute dtype. A
row-parallel rank has a term of each square norm, [out_features] numbers: all terms of a stage are summed over tp in one
message. Nothing else is sent: the factors are applied to what a rank holds of the product, after its reduction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megalora.adapters.dora import base_square_norms, factors, square_norms
from megalora.ops.column_scale import scale_columns, scale_columns_, scale_columns_backward
from megalora.parallel.base import FrozenMatrix
from megalora.parallel.collectives import all_reduce
from megalora.parallel.linear import ParallelLinear
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement


class Decomposition:
    """The magnitudes of a group's linears; columns of linears without one have the factor 1.

    rows  of each linear in the group's matrix
    """

    def __init__(self, linears: Sequence[ParallelLinear], rows: Sequence[slice]):
        self._parts = [(i, linear, rows[i]) for i, linear in enumerate(linears) if linear.magnitude is not None]
        self._linears, self._rows = linears, rows
        self.size = rows[-1].stop
        self._base: torch.Tensor | None = None  # ||W||² of each row, once the weights are loaded
        self.scale: torch.Tensor | None = None  # m / norm [O]
        self._norms: torch.Tensor | None = None  # [O]
        self._per_norm: torch.Tensor | None = None  # 1 / norm [O]
        self._per_magnitude: torch.Tensor | None = None  # 1 / m [O]

    def squares(self, matrix: FrozenMatrix, down: torch.Tensor) -> torch.Tensor:
        """Return this rank's term of the square norm of each row [O], 1 of linears without magnitudes; down: A of all
        branches in the compute dtype.

        All linears of the group are taken at once: each has columns of the branch to itself, in which the others are 0.
        Those of a quantised base go one by one, for each is decoded.
        """
        whole = slice(0, self.size)
        parts = self._rows if matrix.view(whole) is None else [whole]
        if self._base is None:
            self._base = torch.cat([base_square_norms(matrix.weight(rows)) for rows in parts])
        squares = torch.cat(
            [
                square_norms(matrix.weight(rows), down, matrix.branch(rows, slice(0, len(down))), self._base[rows])
                for rows in parts
            ]
        )
        for linear, rows in zip(self._linears, self._rows, strict=True):
            if linear.magnitude is None:
                squares[rows] = 1.0  # of rows of zeros too the factor is 1: their biases may be trained
        return squares

    def magnitudes(self, norms: torch.Tensor) -> list[torch.Tensor]:
        """Return m of each linear in the dtype of norms [O]; the norms, 1, where a linear has none."""
        return [
            norms[rows] if linear.magnitude is None else linear.magnitude.detach().to(norms.dtype)
            for linear, rows in zip(self._linears, self._rows, strict=True)
        ]

    def settle(
        self, norms: torch.Tensor, scale: torch.Tensor, per_norm: torch.Tensor, per_magnitude: torch.Tensor
    ) -> None:
        """Take the norms, the factors m / norm, and 1 / norm and 1 / m, [O] each."""
        self._norms, self.scale, self._per_norm, self._per_magnitude = norms, scale, per_norm, per_magnitude

    def reset(self) -> None:
        """Set the magnitudes to the norms, with which the adapter is W + s B A itself."""
        for _, linear, rows in self._parts:
            linear.magnitude.data.copy_(self._norms[rows])

    @torch.no_grad()
    def switch(self, adapted: bool) -> None:
        """Put the factors in force, or 1 everywhere, in place."""
        for _, linear, rows in self._parts:
            magnitude = linear.magnitude.to(self._norms.dtype)
            self.scale[rows] = factors(magnitude, self._norms[rows]) if adapted else 1.0

    def apply(self, product: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (y = product * factors + bias, what `backward` reads of it), for product [T, O], which is overwritten.

        Without a bias that is y, which most readers of y keep anyway; else it is the product as it was.
        """
        if bias is None:
            y = scale_columns_(product, self.scale)
            return y, y
        return scale_columns(product, self.scale, bias), product

    def backward(
        self, dy: torch.Tensor, kept: torch.Tensor, has_bias: bool, into: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """Return the gradient of the product, dy * factors; add those of the magnitudes to `into`, by linear.

        kept, has_bias  as `apply` gave it, and whether it was given a bias
        """
        dproduct, dots = scale_columns_backward(dy, kept if into else None, self.scale)
        if into:  # y = product m / norm: dm = sum of dy product / norm = sum of dy y / m
            dots = dots.mul_(self._per_norm if has_bias else self._per_magnitude)
            parts = [(into[i], dots[rows].to(into[i].dtype)) for i, _, rows in self._parts if i in into]
            torch._foreach_add_([whole for whole, _ in parts], [part for _, part in parts])
        return dproduct


def settle_norms(groups: Sequence[tuple[Decomposition, FrozenMatrix, torch.Tensor, bool]], place: Placement) -> None:
    """Set the factors of all groups of a stage: (decomposition, matrix, down, row-parallel) each. Collective."""
    squares = [found.squares(matrix, down) for found, matrix, down, _ in groups]
    cut = [i for i, (_, _, _, row_parallel) in enumerate(groups) if row_parallel]
    if cut and place.tp.size > 1:
        _sum_over(place.tp, [squares[i] for i in cut])
    # Of all groups at once: one by one it would be thousands of operations a step.
    sizes = [found.size for found, *_ in groups]
    norms = torch.cat(squares).clamp_min_(0).sqrt_()
    parts = zip(groups, norms.split(sizes), strict=True)
    magnitudes = torch.cat([m for (found, *_), part in parts for m in found.magnitudes(part)])
    flat = norms, factors(magnitudes, norms), _inverse(norms), _inverse(magnitudes)
    for (found, *_), *own in zip(groups, *(each.split(sizes) for each in flat), strict=True):
        found.settle(*own)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """Return 1 / x; 0 where x is."""
    return torch.where(x != 0, 1 / x, 0.0)


def _sum_over(tp: Axis, parts: Sequence[torch.Tensor]) -> None:
    """Sum each tensor over tp in place, in one message."""
    whole = all_reduce(torch.cat(list(parts)), tp)
    for part, total in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
        part.copy_(total)
