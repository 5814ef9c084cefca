"""Documents: token ids and labels of many documents in a few flat arrays, in memory or mapped from a file.

Three documents of 4, 3 and 2 tokens, the labelled ones marked with a dot below:

    ids       a1 a2 a3 a4 b1 b2 b3 c1 c2        ends      4  7  9
                     .  .     .  .     .        runs      2:4  1:3  1:2     (start:stop within the document)
                                                run_ends  1  2  3
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..pictures import Picture
from .template import IGNORE, Sample

CLASSES = "classes"  # the column of what is to be learned where that is no token


@dataclass(frozen=True)
class Documents:
    """D documents of T tokens in all, with K runs of labelled tokens.

    ids       [T] int32
    ends      [D] int64, where each document ends in `ids`
    runs      [K, 2] int32, (start, stop) of the labelled runs, counted from the document's start
    run_ends  [D] int64, where each document's runs end in `runs`
    rows      [D] int64, the number of the row that each came from, over all sources
    columns   [T] or [T, k] int32 each, as Sample.columns; every document has the same
    weights   [K] float32, what a label of each run counts for in the loss; None: all count 1
    pictures  [D], the image of each; empty where they have none
    """

    ids: np.ndarray
    ends: np.ndarray
    runs: np.ndarray
    run_ends: np.ndarray
    rows: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    weights: np.ndarray | None = None
    pictures: Sequence[Picture] = ()

    @classmethod
    def of(cls, samples: Sequence[Sample], rows: Sequence[int]) -> Documents:
        """Build from documents with labels that are not shifted, and their row numbers."""
        ends = np.cumsum([len(sample.input_ids) for sample in samples], dtype=np.int64)
        counted: np.ndarray = _concatenated([sample.labels for sample in samples], np.int32) != IGNORE
        weighted = any(sample.weights is not None for sample in samples)
        if weighted:
            given = [
                np.ones(len(sample.labels), np.float32) if sample.weights is None else sample.weights
                for sample in samples
            ]
            counted = np.where(counted, _concatenated(given, np.float32), np.float32(0))
        runs, run_ends, weights = label_runs(counted, ends)
        return cls(
            _concatenated([sample.input_ids for sample in samples], np.int32),
            ends,
            runs,
            run_ends,
            np.asarray(rows, dtype=np.int64),
            {
                name: _concatenated([sample.columns[name] for sample in samples], np.int32)
                for name in (samples[0].columns if samples else ())
            },
            weights if weighted else None,
            [sample.picture for sample in samples if sample.picture is not None],
        )

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """[D] int64, tokens of each document."""
        return np.diff(self.ends, prepend=0)

    @property
    def label_counts(self) -> np.ndarray:
        """[D] int64, labels of each document once they are shifted: the first token is never predicted.

        Classes are not shifted.
        """
        if CLASSES in self.columns:
            found = np.concatenate(([0], np.cumsum(np.asarray(self.columns[CLASSES]) != IGNORE, dtype=np.int64)))
            return np.diff(found[self.ends], prepend=0)
        sums = np.concatenate(([0], np.cumsum(self._run_labels, dtype=np.int64)))
        return np.diff(sums[self.run_ends], prepend=0)

    @property
    def label_weights(self) -> np.ndarray | None:
        """[D] float64, what the labels of each document count for together; None where all labels count 1."""
        if self.weights is None:
            return None
        document = np.repeat(np.arange(len(self)), np.diff(self.run_ends, prepend=0))
        return np.bincount(document, self._run_labels * self.weights.astype(np.float64), len(self))

    @property
    def _run_labels(self) -> np.ndarray:
        """[K], labels of each run once they are shifted."""
        return self.runs[:, 1] - np.maximum(self.runs[:, 0], 1)

    def written(self) -> Iterator[bytes]:
        """Yield all that the documents say, for a hash: of each its length, ids, labels, columns, weights and image."""
        if not self.columns and self.weights is None and not self.pictures:
            yield self._plainly_written()
            return
        for index in range(len(self)):
            sample = self.sample(index)
            yield len(sample.input_ids).to_bytes(8, "little")
            yield sample.input_ids.astype("<i4").tobytes() + sample.labels.astype("<i4").tobytes()
            for name, column in sorted(sample.columns.items()):
                yield name.encode() + column.astype("<i4").tobytes()
            if sample.weights is not None:
                yield b"weights" + sample.weights.astype("<f4").tobytes()
            if sample.picture is not None:
                yield b"picture" + sample.picture.digest.encode()

    def _plainly_written(self) -> bytes:
        """Return `written` of documents that are ids and labels alone, all at once."""
        lengths = self.lengths
        first_tokens, first_words = self.ends - lengths, np.cumsum(2 + 2 * lengths) - (2 + 2 * lengths)
        edges = np.zeros(len(self.ids) + 1, dtype=np.int8)  # 1 where a labelled run starts, -1 where one ends
        runs = self.runs + np.repeat(first_tokens, np.diff(self.run_ends, prepend=0))[:, None]
        np.add.at(edges, runs[:, 0], 1)
        np.add.at(edges, runs[:, 1], -1)
        words = np.empty(2 * (len(self) + len(self.ids)), dtype="<i4")
        words[first_words], words[first_words + 1] = lengths, lengths >> 32
        places = np.arange(len(self.ids)) + np.repeat(first_words + 2 - first_tokens, lengths)
        words[places] = self.ids
        words[places + np.repeat(lengths, lengths)] = np.where(np.cumsum(edges[:-1]) > 0, self.ids, IGNORE)
        return words.tobytes()

    def sample(self, index: int) -> Sample:
        """Return one document. Its labels are not shifted."""
        start, stop = _bounds(self.ends, index)
        ids = np.array(self.ids[start:stop])
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        first, last = _bounds(self.run_ends, index)
        weights = None if self.weights is None else np.zeros(len(ids), dtype=np.float32)
        for run, (begin, end) in enumerate(self.runs[first:last].tolist(), first):
            labels[begin:end] = ids[begin:end]
            if weights is not None:
                weights[begin:end] = self.weights[run]
        columns = {name: np.array(column[start:stop]) for name, column in self.columns.items()}
        return Sample(ids, labels, columns, weights, self.pictures[index] if self.pictures else None)


def label_runs(counted: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the labelled runs of documents that end at `ends` [D]: `Documents.runs`, `.run_ends` and `.weights`.

    counted  [T], what each label counts for, 0 where there is none; a run has one value
    """
    edges = np.ones(len(counted) + 1, dtype=bool)
    edges[1:-1] = counted[1:] != counted[:-1]
    edges[ends] = True
    bounds = np.flatnonzero(edges)
    starts, stops = bounds[:-1], bounds[1:]
    labelled = counted[starts] != 0
    starts, stops = starts[labelled], stops[labelled]
    document = np.searchsorted(ends, starts, side="right")
    first = (ends - np.diff(ends, prepend=0))[document]
    runs = np.stack([starts - first, stops - first], axis=1).astype(np.int32)
    run_ends = np.cumsum(np.bincount(document, minlength=len(ends)), dtype=np.int64)
    return runs, run_ends, counted[starts].astype(np.float32)


def _bounds(ends: np.ndarray, index: int) -> tuple[int, int]:
    return int(ends[index - 1]) if index else 0, int(ends[index])


def _concatenated(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)
