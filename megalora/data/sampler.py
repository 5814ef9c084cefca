"""Sampler: which row goes where in which step, as pure functions of (seed, epoch, step).

A step takes global_batch_rows = micro_batch_rows * num_microbatches * dp_size rows. Row r of the step belongs
to microbatch m of dp rank d at position i, where r = (m * dp_size + d) * micro_batch_rows + i. With 2 rows a
microbatch, 2 microbatches and dp 2:

    r           0 1 | 2 3 | 4 5 | 6 7
    microbatch    0 |   0 |   1 |   1
    dp rank       0 |   1 |   0 |   1

So the rows of a step, and their numbers in it, do not depend on dp_size where the global batch is the same.

Rows of one long document take more work than rows of many short ones, and a step takes as long as its busiest rank.
Where that one would have more than 2% too much, rows go to other ranks than that, with the numbers that they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_HASHED = 1 << 14  # rows at a time, as Python objects
PACKING_EPOCH = -1  # the order in which documents are packed, before any epoch
_EVEN = 1.02  # times the work of the busiest rank that dealing by work would give: let it be
EVALUATION_EPOCH = -2  # the rows that are held out for evaluation
SOURCE_EPOCH = -3  # the documents of source n that a weight with a fraction repeats: SOURCE_EPOCH - n


def permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return an order of range(rows), [rows] int64. Sorted by hash: the same with every version of Python and numpy."""
    key = f"{seed}/{epoch}/".encode()
    hashes = np.empty((rows, 2), ">u8")
    for first in range(0, rows, _HASHED):
        part = range(first, min(first + _HASHED, rows))
        digests = b"".join([blake2b(key + str(row).encode(), digest_size=16).digest() for row in part])
        hashes[first : part.stop] = np.frombuffer(digests, ">u8").reshape(-1, 2)
    return np.lexsort((hashes[:, 1], hashes[:, 0]))


def steps_per_epoch(rows: int, global_batch_rows: int) -> int:
    """Return the steps of an epoch; the last may be short of rows, and is filled up with empty ones."""
    return -(-rows // global_batch_rows)


def rows_in_microbatch(microbatch: int, micro_batch_rows: int, dp_rank: int, dp_size: int) -> range:
    """Return numbers within the step of the rows of one microbatch on one dp rank."""
    first = (microbatch * dp_size + dp_rank) * micro_batch_rows
    return range(first, first + micro_batch_rows)


def deal(work: Sequence[float], micro_batch_rows: int, num_microbatches: int, dp_size: int) -> list[list[int]]:
    """Return numbers within the step of the rows of each dp rank, one microbatch after another.

    work  of each row of the step, in any unit
    Each rank has as many rows. The longest go first, each to the rank with the least work so far.
    """
    places = [
        [row for m in range(num_microbatches) for row in rows_in_microbatch(m, micro_batch_rows, rank, dp_size)]
        for rank in range(dp_size)
    ]
    by_work: list[list[int]] = [[] for _ in range(dp_size)]
    totals = [0.0] * dp_size
    for row in sorted(range(len(work)), key=lambda row: -work[row]):
        open_ranks = [rank for rank in range(dp_size) if len(by_work[rank]) < len(places[rank])]
        rank = min(open_ranks, key=lambda rank: totals[rank])
        by_work[rank].append(row)
        totals[rank] += work[row]
    busiest = max(sum(work[row] for row in rows) for rows in places)
    return [sorted(rows) for rows in by_work] if busiest > _EVEN * max(totals) else places
