"""Base weights with an adapter in them, made as they are read: nothing is changed in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from megalora.checkpoint.base.weights import BaseWeights
from megalora.errors import UserError


class MergedWeights:
    """The weights `base`, where W of an adapted linear is W + s B A and a trained bias stands for the base's.

    base      of any floating-point dtype, which the result has too; the sum is in float32 (float64 where W is)
    scalings  s of each adapted linear, by its name
    tensors   the whole adapter by parameter name: lora_A [r, in], lora_B [out, r], trained biases [out]
    transposed  names of linears whose weight is [in, out] in the file
    """

    def __init__(
        self,
        base: BaseWeights,
        scalings: Mapping[str, float],
        tensors: Mapping[str, torch.Tensor],
        transposed: Collection[str] = (),
    ):
        self._base, self._scalings, self._tensors, self._transposed = base, scalings, tensors, frozenset(transposed)
        self.shapes = base.shapes

    def where(self, name: str) -> str:
        return self._base.where(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def stored(self, name: str) -> None:
        """Nothing is quantised with an adapter in it."""

    @torch.no_grad()
    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copies the merged `tensor[index]` into `out` (its shape, its dtype).

        Raises UserError where the sum is not finite in that dtype.
        """
        assert out.dtype == self.dtype(name), (name, out.dtype)
        linear, _, leaf = name.rpartition(".")
        if name in self._tensors:
            out.copy_(self._tensors[name][index])
        else:
            self._base.copy(name, index, out)
            if leaf != "weight" or linear not in self._scalings:
                return
            wide = torch.promote_types(out.dtype, torch.float32)
            a, b = (self._tensors[f"{linear}.{factor}.weight"].to(wide) for factor in ("lora_A", "lora_B"))
            rows, columns = index
            left, right = (a.t(), b.t()) if linear in self._transposed else (b, a)
            out.copy_(out.to(wide).addmm_(left[rows], right[:, columns], alpha=self._scalings[linear]))
        if not out.isfinite().all():
            raise UserError(
                f"{self.where(name)}: {name} with the adapter in it is not finite in {out.dtype}: the adapter is "
                "damaged, or too large for that dtype; take another checkpoint of its run"
            )
