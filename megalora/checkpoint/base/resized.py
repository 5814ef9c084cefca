"""Base weights of a model that has another number of words than its files."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from megalora.checkpoint.base.source import BaseWeights
from megalora.ops.fp8 import Fp8Weight
from megalora.ops.nf4 import Nf4Weight

_ROWS = 4096  # that are summed at a time


class ResizedWeights:
    """The weights `base` with `words` rows in each tensor of `of_words`: the file's, and behind them their mean.

    The mean is what transformers' resize_token_embeddings draws new rows around, and is the same on every rank: the
    sum, in float64, takes the rows in the same order everywhere.
    """

    def __init__(self, base: BaseWeights, words: int, of_words: Collection[str]):
        self._base, self._of_words = base, frozenset(of_words)
        self._means: dict[str, torch.Tensor] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: (words, *shape[1:]) if name in self._of_words else shape for name, shape in base.shapes.items()
        }

    def where(self, name: str) -> str:
        return self._base.where(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def stored(self, name: str) -> Nf4Weight | Fp8Weight | None:
        """Return the quantised form of a weight; None for one that has another number of rows here."""
        return None if name in self._of_words else self._base.stored(name)

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copy `tensor[index]` into `out` (its shape)."""
        if name not in self._of_words:
            self._base.copy(name, index, out)
            return
        rows, columns = index[0], index[1:]
        last = self._base.shapes[name][0]
        there = max(0, min(rows.stop, last) - rows.start)
        if there:
            self._base.copy(name, (slice(rows.start, rows.start + there), *columns), out[:there])
        if there < rows.stop - rows.start:
            out[there:].copy_(self._mean(name)[columns])

    def _mean(self, name: str) -> torch.Tensor:
        """Return the mean row of the file's, in float64."""
        if name not in self._means:
            count, *more = self._base.shapes[name]
            total = torch.zeros(more, dtype=torch.float64)
            for start in range(0, count, _ROWS):
                rows = slice(start, min(start + _ROWS, count))
                block = torch.empty(rows.stop - rows.start, *more, dtype=self._base.dtype(name))
                self._base.copy(name, (rows, *(slice(0, n) for n in more)), block)
                total += block.double().sum(0)
            self._means[name] = total / count
        return self._means[name]
