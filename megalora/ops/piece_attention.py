"""Causal attention of pieces of documents: each piece's queries see keys of their document up to themselves.

The keys of each piece stand in one run, those of its last query the last: query i of m sees all but the last m - 1 - i
of its n keys, or the window before it. On a GPU one call of FlashAttention's kernels, or for few long pieces cuDNN's
(megalora.ops.merged_attention); elsewhere SDPA, piece by piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalora.ops.attention import cached_attention, packs
from megalora.ops.merged_attention import merged_attention
from megalora.ops.tiled_attention import PLAIN, Scores


@dataclass(frozen=True)
class Pieces:
    """Where the pieces lie: cumulative bounds of their queries and of their keys, as ints.

    on_device  both as int32, for kernels that read them there
    spans      of each piece its keys among those of all documents, which stand there once; else they stand piece by
               piece, with the bounds `keys`
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    on_device: tuple[torch.Tensor, torch.Tensor] | None = None
    spans: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, queries: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> Pieces:
        if device.type != "cuda":
            return cls(queries, keys)
        moved = [torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True) for bounds in (queries, keys)]
        return cls(queries, keys, (moved[0], moved[1]))


def piece_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: Pieces,
    window: int | None = None,
    scores: Scores = PLAIN,
) -> torch.Tensor:
    """Return the attention [T, H, D] of q [T, H, D] over the keys of each piece, k, v [S, K, D]: as above, or where
    `pieces.spans` says.

    window, scores  as `attention` takes them; causal scores without softcap and slopes
    """
    assert scores.simple and scores.causal
    if pieces.spans is not None:
        assert window is None
        return merged_attention(q, k, v, pieces.queries, pieces.spans, scores.scale)
    if pieces.on_device is not None and packs(q.shape[2], q.dtype, q.device):
        sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        longest = [max(b - a for a, b in zip(x[:-1], x[1:], strict=True)) for x in (pieces.queries, pieces.keys)]
        flash = torch.ops.aten._flash_attention_forward
        return flash(q, k, v, *pieces.on_device, *longest, 0.0, True, False, scale=scores.scale, **sides)[0]
    parts = []
    for (a, b), (c, d) in zip(*(zip(x[:-1], x[1:], strict=True) for x in (pieces.queries, pieces.keys)), strict=True):
        parts.append(cached_attention(q[a:b], k[c:d], v[c:d], window, scores))
    return torch.cat(parts)
