"""Base weights with an adapter in them, made as they are read: nothing is changed in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

from megalora.adapters.dora import factors, square_norms
from megalora.adapters.words import TOKENS
from megalora.checkpoint.base.source import BaseWeights
from megalora.errors import UserError


class Merged(Protocol):
    """What merging reads of the adapter of one linear (megalora.adapters.lora.Adapter)."""

    @property
    def scaling(self) -> float: ...

    @property
    def bias(self) -> bool: ...

    @property
    def dora(self) -> bool: ...


class MergedWeights:
    """The weights `base`, where W of an adapted linear is W + s B A and a trained bias stands for the base's.

    With DoRA it is m / ||W + s B A|| (W + s B A), row by row; with a bias of B, the base's bias is b + s times that.

    base      of any floating-point dtype, which the result has too; the sum is in float32 (float64 where W is)
    adapters  of each adapted linear, by its name
    tensors   the whole adapter by parameter name: lora_A [r, in], lora_B [out, r], ..., trained biases [out]
    own         tensors that the adapter brings whole, which the base need not have: a classifier's head
    transposed  names of linears whose weight is [in, out] in the file
    tokens    ids of the tokens whose rows are trained, by name of the embedding or the head
    Raises UserError where a bias of B has no bias of the base to be added to.
    """

    def __init__(
        self,
        base: BaseWeights,
        adapters: Mapping[str, Merged],
        tensors: Mapping[str, torch.Tensor],
        transposed: Collection[str] = (),
        tokens: Mapping[str, tuple[int, ...]] | None = None,
        own: Collection[str] = (),
    ):
        self._base, self._adapters, self._tensors, self._transposed = base, adapters, tensors, frozenset(transposed)
        whole = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in own}
        self.shapes: Mapping[str, tuple[int, ...]] = {**base.shapes, **whole}
        self._tokens = dict(tokens or {})
        for name, adapter in adapters.items():
            if adapter.bias and f"{name}.bias" not in self.shapes:
                raise UserError(
                    f"adapter: {name} has a bias of lora_B (lora_bias), but the model has no bias there to merge it "
                    "into",
                    "use the adapter as it is",
                )

    def where(self, name: str) -> str:
        return self._base.where(name) if name in self._base.shapes else "adapter"

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name if name in self._base.shapes else next(iter(self._base.shapes)))

    def stored(self, name: str) -> None:
        """Return None: nothing is quantised with an adapter in it."""

    @torch.no_grad()
    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copy the merged `tensor[index]` into `out` (its shape, its dtype).

        Raises UserError where the sum is not finite in that dtype.
        """
        assert out.dtype == self.dtype(name), (name, out.dtype)
        linear, _, leaf = name.rpartition(".")
        adapter = self._adapters.get(linear)
        own = self._tensors.get(name)
        if own is not None:
            out.copy_(own[index])
        else:
            self._base.copy(name, index, out)
        if leaf == "weight" and linear in self._tokens:
            self._put_tokens(linear, index, out)
        elif adapter is not None and leaf == "weight":
            self._add(linear, adapter, index, out)
        elif adapter is not None and adapter.bias and leaf == "bias":
            wide = torch.promote_types(out.dtype, torch.float32)
            added = self._tensors[f"{linear}.lora_B.bias"][index].to(wide)
            out.copy_(out.to(wide).add_(added, alpha=adapter.scaling))
        elif own is None:
            return
        if not out.isfinite().all():
            raise UserError(
                f"{self.where(name)}: {name} with the adapter in it is not finite in {out.dtype}: the adapter is "
                "damaged, or too large for that dtype",
                "take another checkpoint of its run",
            )

    def _put_tokens(self, words: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        rows = self._tensors[f"{words}.{TOKENS}"]
        for place, token in enumerate(self._tokens[words]):
            if index[0].start <= token < index[0].stop:
                out[token - index[0].start].copy_(rows[place][index[1]])

    def _add(self, linear: str, adapter: Merged, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Merge into `out`, which has weight[index] of the base."""
        wide = torch.promote_types(out.dtype, torch.float32)
        factors_of_linear = [f"{linear}.{factor}.weight" for factor in ("lora_A", "lora_B")]
        embedding = [f"{linear}.lora_embedding_{factor}" for factor in "AB"]
        a, b = (self._tensors[n].to(wide) for n in (embedding if embedding[0] in self._tensors else factors_of_linear))
        transposed = linear in self._transposed or embedding[0] in self._tensors  # words lie along the rows
        rows, columns = index[::-1] if transposed else index
        W = out.t() if transposed else out
        merged = torch.addmm(W.to(wide), b[rows], a[:, columns], alpha=adapter.scaling)
        if adapter.dora:
            whole = slice(0, a.shape[1])
            if columns != whole:  # the norm is of whole rows
                full = torch.empty(W.shape[0], a.shape[1], dtype=out.dtype)
                part = (whole, rows) if transposed else (rows, whole)
                self._base.copy(f"{linear}.weight", part, full.t() if transposed else full)
            norms = square_norms((W if columns == whole else full).to(wide), a, b[rows] * adapter.scaling).sqrt()
            magnitude = self._tensors[f"{linear}.lora_magnitude_vector"][rows].to(wide)
            merged.mul_(factors(magnitude, norms).unsqueeze(1))
        W.copy_(merged)
