"""Context parallelism: each document cut over ranks, so that every rank has as much attention to compute.

A document of n tokens is cut into 2 C pieces for C ranks, and rank r has the r-th piece and the r-th from the end
(zigzag): early tokens see few keys, late ones many. With C = 2 and documents of 8 and 5 tokens:

    rank 0   a0 a1 . . . . a6 a7 | b0 b1 . . b4          rank 1   . . a2 a3 a4 a5 . . | . . b2 b3 .

Pieces of a document differ by one token at most. Which ranks have the longer ones is dealt so that all ranks hold the
same number of tokens of a microbatch, without padding. Queries see keys of other ranks: `Context` says which, in the
order in which the keys of all ranks stand one rank after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..batch import Batch, Context


@dataclass(frozen=True)
class _Piece:
    """Tokens [start, stop) of the microbatch, of a document that begins at `document`."""

    document: int
    start: int
    stop: int


def cut_batch(batch: Batch, rank: int, ranks: int) -> Batch:
    """Return what one of `ranks` context-parallel ranks has of a microbatch, whose tokens they divide evenly."""
    total = len(batch.input_ids)
    assert total % ranks == 0, (total, ranks)
    pieces = cut_documents(batch.cu_seqlens.tolist(), ranks)
    order = [np.concatenate([np.arange(p.start, p.stop) for p in own]) for own in pieces]
    place = np.empty(total, dtype=np.int64)
    place[np.concatenate(order)] = np.arange(total)
    own = torch.from_numpy(order[rank])
    lengths = [piece.stop - piece.start for piece in pieces[rank]]
    context = Context(
        torch.from_numpy(place),
        tuple(lengths),
        tuple(piece.document for piece in pieces[rank]),
        tuple(piece.stop for piece in pieces[rank]),
    )
    return replace(
        batch,
        input_ids=batch.input_ids[own],
        labels=batch.labels[own],
        position_ids=batch.position_ids[own],
        token_index=batch.token_index[own],
        columns={name: column[own] for name, column in batch.columns.items()},
        weights=None if batch.weights is None else batch.weights[own],
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        context=context,
    )


def cut_documents(bounds: Sequence[int], ranks: int) -> list[list[_Piece]]:
    """Return the pieces of each rank, of documents with these cumulative bounds; empty ones are left out."""
    held = [0] * ranks
    found: list[list[_Piece]] = [[] for _ in range(ranks)]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        base, longer = divmod(stop - start, 2 * ranks)
        more = [0] * ranks
        for _ in range(longer):  # to whoever has least
            least = min((r for r in range(ranks) if more[r] < 2), key=lambda r: (held[r] + more[r], r))
            more[least] += 1
        sizes = [base + (more[r] > 0) for r in range(ranks)] + [base + (more[r] > 1) for r in reversed(range(ranks))]
        at = start
        for piece, size in enumerate(sizes):
            if size:
                found[min(piece, 2 * ranks - 1 - piece)].append(_Piece(start, at, at + size))
            at += size
        held = [a + 2 * base + b for a, b in zip(held, more, strict=True)]
    assert len(set(held)) == 1, held
    return found
