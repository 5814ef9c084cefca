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

    rows, branches  of each linear in the group's matrix
    """

    def __init__(self, linears: Sequence[ParallelLinear], rows: Sequence[slice], branches: Sequence[slice]):
        self._parts = [
            (i, linear, rows[i], branches[i]) for i, linear in enumerate(linears) if linear.magnitude is not None
        ]
        self._size = rows[-1].stop
        self._base: list[torch.Tensor] = []  # ||W||² of each part's rows, once the weights are loaded
        self.scale: torch.Tensor | None = None  # m / norm [O]
        self._norms: torch.Tensor | None = None  # [O]

    def squares(self, matrix: FrozenMatrix, down: torch.Tensor) -> torch.Tensor:
        """Return this rank's term of the square norm of each row [O]; down: A of all branches in the compute dtype."""
        weights = [matrix.weight(rows) for _, _, rows, _ in self._parts]
        if not self._base:
            self._base = [base_square_norms(W) for W in weights]
        found = self._base[0].new_ones(self._size)
        for (_, _, rows, columns), W, base in zip(self._parts, weights, self._base, strict=True):
            found[rows] = square_norms(W, down[columns], matrix.branch(rows, columns), base)
        return found

    def settle(self, squares: torch.Tensor) -> None:
        """Set the factors from the whole square norms [O]."""
        self._norms = squares.clamp_min(0).sqrt()
        self.scale = torch.ones_like(self._norms)
        for _, linear, rows, _ in self._parts:
            self.scale[rows] = factors(linear.magnitude.detach().to(self._norms.dtype), self._norms[rows])

    def reset(self) -> None:
        """Set the magnitudes to the norms, with which the adapter is W + s B A itself."""
        for _, linear, rows, _ in self._parts:
            linear.magnitude.data.copy_(self._norms[rows])

    @torch.no_grad()
    def switch(self, adapted: bool) -> None:
        """Put the factors in force, or 1 everywhere, in place."""
        for _, linear, rows, _ in self._parts:
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
        for i, linear, rows, _ in self._parts:
            if i in into:  # y = product m / norm: dm = sum of dy product / norm = sum of dy y / m
                divisor = self._norms[rows] if has_bias else linear.magnitude.detach().to(self._norms.dtype)
                into[i].add_(torch.where(divisor != 0, dots[rows] / divisor, 0.0))
        return dproduct

    def bias_gradient(self, total: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the sum of dy over the tokens from that of dy * factors, for `rows` of the group."""
        scale = self.scale[rows].to(total.dtype)
        return torch.where(scale != 0, total / scale, 0.0)


def settle_norms(groups: Sequence[tuple[Decomposition, FrozenMatrix, torch.Tensor, bool]], place: Placement) -> None:
    """Set the factors of all groups of a stage: (decomposition, matrix, down, row-parallel) each. Collective."""
    squares = [found.squares(matrix, down) for found, matrix, down, _ in groups]
    cut = [i for i, (_, _, _, row_parallel) in enumerate(groups) if row_parallel]
    if cut and place.tp.size > 1:
        _sum_over(place.tp, [squares[i] for i in cut])
    for (found, _, _, _), whole in zip(groups, squares, strict=True):
        found.settle(whole)


def _sum_over(tp: Axis, parts: Sequence[torch.Tensor]) -> None:
    """Sum each tensor over tp in place, in one message."""
    whole = all_reduce(torch.cat(list(parts)), tp)
    for part, total in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
        part.copy_(total)
