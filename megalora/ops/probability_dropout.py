"""Dropout of attention's probabilities: a mask is a function of (seed, site of the head, step, query token, key token).

The masks are those of megalora.ops.dropout with the key's token in the place of the feature, and a site for each head:
no layout moves them. The tokens of a document are consecutive numbers.

Legend: C documents of one length, N tokens of each, H heads of this rank, n queries and m keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalora.ops.dropout import Dropout, philox4x32


@dataclass(frozen=True)
class ProbabilityDropout:
    """p, seed and step of a Dropout; sites [H], one a head of this rank; token_index [T] int64.

    key_index  [S] int64, of the keys where they are other tokens (cross attention); None: token_index
    """

    draw: Dropout
    sites: torch.Tensor
    token_index: torch.Tensor
    key_index: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        """What is kept is multiplied by it."""
        return self.draw.scale

    def of(self, tokens: slice, keys: slice | None = None) -> ProbabilityDropout:
        """Return that of a part of the tokens, and of the keys where they are others."""
        key_index = None if keys is None or self.key_index is None else self.key_index[keys]
        return ProbabilityDropout(self.draw, self.sites, self.token_index[tokens], key_index)

    def keep(self, documents: int, queries: slice, keys: slice) -> torch.Tensor:
        """Return which probabilities are kept, bool [C, H, n, m], of a tile of each of C documents of equal length."""
        tokens = self.token_index.unflatten(0, (documents, -1))
        of_keys = tokens if self.key_index is None else self.key_index.unflatten(0, (documents, -1))
        query, first = tokens[:, queries, None], of_keys[:, keys.start, None]
        count = keys.stop - keys.start
        block, skip = first // 8, first % 8
        blocks = torch.arange((count + 14) // 8, device=first.device)
        counter = (query, (block + blocks)[:, None], self.draw.step, query >> 32)
        words = philox4x32(tuple(self._by_head(word) for word in counter), (self.draw.key, self._sites))  # type: ignore[arg-type]  # sites as a tensor
        lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).flatten(-2)
        columns = (skip + torch.arange(count, device=first.device))[:, None, None].expand(*lanes.shape[:-1], -1)
        return lanes.gather(-1, columns) >= self.draw.threshold

    @property
    def _sites(self) -> torch.Tensor:
        return self.sites[:, None, None]

    def _by_head(self, word: torch.Tensor | int) -> torch.Tensor | int:
        """Give a word of the counter a dimension for the heads: [C, n, B] -> [C, H, n, B]."""
        if not isinstance(word, torch.Tensor) or word.dim() == 0:
            return word
        return word[:, None].expand(-1, len(self.sites), -1, -1)


def draw_probabilities(
    draw: Dropout | None, sites: torch.Tensor, token_index: torch.Tensor, key_index: torch.Tensor | None = None
) -> ProbabilityDropout | None:
    """Return the ProbabilityDropout of these sites [H] int64, or None where nothing is drawn; key_index: see there."""
    if draw is None or draw.threshold == 0:
        return None
    return ProbabilityDropout(draw, sites, token_index, key_index)
