"""Loader: packed rows -> the batches of a step, for one dp rank.

Every rank has all rows before it, mapped from a file, so the counts over the whole global batch need no communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch

from ..batch import Batch
from .context import cut_batch
from .packing import PICTURES, PackedRows, Row
from .sampler import deal, permutation, steps_per_epoch

T = TypeVar("T")

PADDING_PIECE = 32


@dataclass(frozen=True)
class Step:
    """One optimizer step. `microbatches` are this dp rank's; the counts are over the whole global batch.

    label_count: labels that are not -100, or what they count for together where rows have weights: the summed loss is
                 divided by it
    token_count: tokens that are not padding
    """

    microbatches: list[Batch]
    label_count: float
    token_count: int


class Loader:
    """`step(n)` gives step n of an endless run over `rows`; each epoch has every row exactly once.

    cp_rank, cp_size: of a context-parallel axis, over which each microbatch is cut (see context.py).
    token_work: what all but attention takes for a token, in tokens that attention goes through for it; it says how much
    more work a row of a long document is (see sampler.deal).
    num_microbatches is per dp rank. With shuffle=False each epoch has the rows in order (an eval set is read
    for one epoch).
    """

    def __init__(
        self,
        rows: PackedRows,
        *,
        micro_batch_rows: int,
        num_microbatches: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
        cp_rank: int = 0,
        cp_size: int = 1,
        token_work: float = math.inf,
    ):
        assert micro_batch_rows > 0 and num_microbatches > 0 and 0 <= dp_rank < dp_size
        self.rows = rows
        self.micro_batch_rows = micro_batch_rows
        self.num_microbatches = num_microbatches
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seed = seed
        self.shuffle = shuffle
        self.cp_rank, self.cp_size = cp_rank, cp_size
        self._attention = None if math.isinf(token_work) else _attention_work(rows) / (rows.seq_length * token_work)
        self.global_batch_rows = micro_batch_rows * num_microbatches * dp_size
        self.steps_per_epoch = steps_per_epoch(rows.rows, self.global_batch_rows)
        self._empty = rows.empty
        self._order: tuple[int, np.ndarray] = (0, self._epoch_order(0))  # a cache: (epoch, its order)

    def step(self, step: int) -> Step:
        """Step `step`, counted from 0 over all epochs; depends on the constructor's arguments alone."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        first = number * self.global_batch_rows
        chosen = self._order[1][first : first + self.global_batch_rows].tolist()
        work = [1.0] * self.global_batch_rows
        if self._attention is not None:
            work[: len(chosen)] = (1.0 + self._attention[chosen]).tolist()
        own = deal(work, self.micro_batch_rows, self.num_microbatches, self.dp_size)[self.dp_rank]
        size = self.micro_batch_rows
        microbatches = [self._batch(chosen, own[at : at + size]) for at in range(0, len(own), size)]
        if self.cp_size > 1:
            microbatches = [cut_batch(batch, self.cp_rank, self.cp_size) for batch in microbatches]
        return Step(
            microbatches,
            label_count=self.rows.row_weights[chosen].sum().item(),
            token_count=int(self.rows.row_tokens[chosen].sum()),
        )

    def _epoch_order(self, epoch: int) -> np.ndarray:
        rows = self.rows.rows
        return permutation(rows, self.seed, epoch).astype(np.int32) if self.shuffle else np.arange(rows, dtype=np.int32)

    def _batch(self, chosen: list[int], places: Sequence[int]) -> Batch:
        """Return the rows at `places` of the step, whose rows are `chosen`; places beyond those are empty rows."""
        rows = [self.rows.row(chosen[r]) if r < len(chosen) else self._empty for r in places]
        batch = _batch_of(rows, places)
        sources = [row.source for row in rows if row.source is not None]
        if not sources:
            return batch
        own, theirs = (_bounds([span for row in side for span in row.spans]) for side in (rows, sources))
        return replace(batch, source=_batch_of(sources, places), crossing=(own, theirs))


def _batch_of(rows: Sequence[Row], places: Sequence[int]) -> Batch:
    """Return rows as the tokens of one batch; places: of the rows in the step."""
    length = len(rows[0].input_ids)
    weights = [row.weights for row in rows if row.weights is not None]  # of all rows, or of none
    columns = {name: _joined([row.columns[name] for row in rows]) for name in rows[0].columns}
    if PICTURES in columns:  # they are counted over all rows of the batch
        before = accumulate((len(row.pictures) for row in rows[:-1]), initial=0)
        more = torch.tensor(list(before)).repeat_interleave(length)
        columns[PICTURES][:, 0] += more * (columns[PICTURES][:, 0] > 0)
    return Batch(
        input_ids=_joined([row.input_ids for row in rows]),
        labels=_joined([row.labels for row in rows]),
        position_ids=_joined([row.position_ids for row in rows]),
        cu_seqlens=torch.tensor(_bounds([one for row in rows for one in _attended(row)]), dtype=torch.int32),
        token_index=torch.cat([torch.arange(r * length, (r + 1) * length) for r in places]),
        columns=columns,
        weights=torch.from_numpy(np.concatenate(weights)) if weights else None,
        pictures=tuple(picture for row in rows for picture in row.pictures),
    )


def _bounds(lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def _attention_work(rows: PackedRows) -> np.ndarray:
    """Return [R] float64, keys that the tokens of each row go through in causal attention."""
    sums = np.concatenate(([0.0], np.cumsum(rows.lengths.astype(np.float64) ** 2)))
    return np.diff(sums[rows.row_ends], prepend=0.0) / 2


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _attended(row: Row) -> list[int]:
    """Return the row's documents for attention: its padding tail in short pieces, since attention costs length
    squared.
    """
    lengths = list(row.lengths)
    if row.used < len(row.input_ids):
        tail = lengths.pop()
        lengths += [PADDING_PIECE] * (tail // PADDING_PIECE)
        lengths += [tail % PADDING_PIECE] if tail % PADDING_PIECE else []
    return lengths


def steps_ahead(step: Callable[[int], T], first: int, stop: int) -> Iterator[T]:
    """Yield step(first) .. step(stop - 1), each made by a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
        coming = thread.submit(step, first) if first < stop else None
        for number in range(first, stop):
            current = coming.result()
            coming = thread.submit(step, number + 1) if number + 1 < stop else None
            yield current
