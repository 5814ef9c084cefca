"""Packing: whole documents into rows of fixed length, labels shifted, no document split or cut.

Three documents, a (4 tokens, the last two of them the reply), b and c, in rows of seq_length 8, pad id 0:

    row 0   input_ids     a1 a2 a3 a4 | b1 b2 b3 |  0          row 1   c1 c2 |  0  0  0  0  0  0
            labels         . a3 a4  . | b2 b3  . |  .                  c2  . |  .  .  .  .  .  .
            position_ids   0  1  2  3 |  0  1  2 |  0                   0  1 |  0  1  2  3  4  5
            documents           4     |    3     |  1                    2   |        6

A dot is -100: nothing to predict. `|` is a bound that attention does not cross; the padding tail is a
document of its own. The shift happens here and nowhere else: labels[t] is the token to predict at t, within
the document.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..pictures import Picture
from .documents import CLASSES, Documents
from .template import IGNORE, Sample

PICTURES = "pictures"  # the column of image tokens
_AT_A_TIME = 1 << 16
OPEN_ROWS = 256  # in which `pack_sides` looks for room


@dataclass(frozen=True)
class Row:
    """One row of S = seq_length tokens.

    input_ids, labels (shifted), position_ids   [S] int32
    weights   [S] float32, what each label counts for in the loss; None: 1 each
    lengths   of its documents, the padding tail the last; they sum to S
    columns   [S] or [S, k] int32 each, as Sample.columns; 0 in the padding
    used      tokens that are not padding
    pictures  images of its documents, in order. The column "pictures" has for each of their tokens (which of them,
              counted from 1; which of its vectors), and (0, 0) elsewhere
    source    what an encoder reads: a row of as many documents, without labels
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    lengths: tuple[int, ...]
    columns: Mapping[str, np.ndarray]
    used: int
    weights: np.ndarray | None = None
    source: Row | None = None
    pictures: tuple[Picture, ...] = ()

    @property
    def spans(self) -> list[int]:
        """The lengths of its documents, and of the padding behind them, which may be 0."""
        return [*self.lengths] if self.used < len(self.input_ids) else [*self.lengths, 0]


@dataclass(frozen=True)
class Sides:
    """The rows of an encoder-decoder: a document is its source, and behind it the target, which alone is labelled.

    source_length   tokens of a row of sources; a row of targets has seq_length
    start_token_id  what the decoder reads first: it reads the target one place later than it is to be predicted
    """

    source_length: int
    start_token_id: int

    def parts(self, document: Sample) -> tuple[Sample, Sample]:
        """Return source and target of a document; the labels of the target are where they are predicted."""
        ids, first = document.input_ids, int(np.flatnonzero(document.labels != IGNORE)[0])
        read = np.concatenate((ids.dtype.type([self.start_token_id]), ids[first:-1]))
        source = Sample(ids[:first], document.labels[:first], picture=document.picture)
        return source, Sample(read, document.labels[first:])

    @staticmethod
    def lengths(source: Documents) -> np.ndarray:
        """Return the tokens of source and target of every document, [D, 2] int64."""
        targets = source.label_counts
        return np.stack([source.lengths - targets, targets], axis=1)


@dataclass(frozen=True)
class PackedRows:
    """R rows of seq_length tokens, laid out when they are asked for (`row`).

    source      the documents, in memory or mapped from a file
    members     [M] int64, documents in the order of the rows that they lie in
    row_ends    [R] int64, where each row ends in `members`
    row_tokens, row_labels   [R] int64, how many tokens are not padding and how many labels are not -100
    row_weights   [R] what the labels count for together: float64, or `row_labels` where all count 1
    max_token_id   the largest token id of the documents
    notes       lines for the start-up: rows that were left out, fields that are not read, rows that were cut
    skipped     how many rows of the file were left out
    fingerprint   sha256 of the documents in the file's order, seq_length and packing: the data's identity
    sides       of an encoder-decoder's rows
    """

    seq_length: int
    pad_token_id: int
    source: Documents
    members: np.ndarray
    row_ends: np.ndarray
    row_tokens: np.ndarray
    row_labels: np.ndarray
    row_weights: np.ndarray
    max_token_id: int
    notes: tuple[str, ...] = ()
    skipped: int = 0
    fingerprint: str = ""
    sides: Sides | None = None

    @property
    def rows(self) -> int:
        return len(self.row_ends)

    @property
    def documents(self) -> int:
        return len(self.members)

    @property
    def tokens(self) -> int:
        return int(self.row_tokens.sum())

    @property
    def labelled_tokens(self) -> int:
        return int(self.row_labels.sum())

    @property
    def lengths(self) -> np.ndarray:
        """[M] int64, tokens of the documents of `members`."""
        return self.source.lengths[self.members]

    @property
    def empty(self) -> Row:
        """A row of padding alone."""
        return replace(self, members=self.members[:0], row_ends=np.zeros(1, np.int64)).row(0)

    def row(self, index: int) -> Row:
        """Return row `index`."""
        start = int(self.row_ends[index - 1]) if index else 0
        documents = [self.source.sample(member) for member in self.members[start : int(self.row_ends[index])].tolist()]
        if self.sides is None:
            labels = [document.columns.get(CLASSES, shift(document.labels)) for document in documents]
            return self._laid_out(documents, labels, self.seq_length, bool(self.source.pictures))
        parts = [self.sides.parts(document) for document in documents]
        sources, targets = [source for source, _ in parts], [target for _, target in parts]
        row = self._laid_out(targets, [target.labels for target in targets], self.seq_length)
        labels, length = [source.labels for source in sources], self.sides.source_length
        source = self._laid_out(sources, labels, length, bool(self.source.pictures))
        return replace(row, source=source)

    def _laid_out(
        self, documents: Sequence[Sample], labels_of: Sequence[np.ndarray], length: int, with_pictures: bool = False
    ) -> Row:
        """Return documents and their labels, each at the place where it is predicted, in a row of `length` tokens."""
        input_ids = np.full(length, self.pad_token_id, dtype=np.int32)
        labels = np.full(length, IGNORE, dtype=np.int32)
        position_ids = np.empty(length, dtype=np.int32)
        columns = {
            name: np.zeros((length, *column.shape[1:]), dtype=np.int32)
            for name, column in self.source.columns.items()
            if name != CLASSES
        }
        if with_pictures:
            columns[PICTURES] = np.zeros((length, 2), dtype=np.int32)
        pictures = [document.picture for document in documents if document.picture is not None]
        weights = None if self.source.weights is None else np.zeros(length, dtype=np.float32)
        lengths, at = [], 0
        for document, its_labels in zip(documents, labels_of, strict=True):
            stop = at + len(document.input_ids)
            assert stop <= length, "a row is over-full"
            input_ids[at:stop], labels[at:stop] = document.input_ids, its_labels
            for name, column in columns.items():
                if name != PICTURES:
                    column[at:stop] = document.columns[name]
            if weights is not None:
                weights[at : stop - 1] = document.weights[1:]
            position_ids[at:stop] = np.arange(stop - at, dtype=np.int32)
            lengths.append(stop - at)
            at = stop
        if at < length:
            position_ids[at:] = np.arange(length - at, dtype=np.int32)
            lengths.append(length - at)
        starts = np.cumsum([0, *lengths])
        for number, picture in enumerate(pictures):  # every document has one, or none has
            places = slice(starts[number], starts[number] + picture.tokens)
            columns[PICTURES][places, 0], columns[PICTURES][places, 1] = number + 1, np.arange(picture.tokens)
        return Row(input_ids, labels, position_ids, tuple(lengths), columns, at, weights, pictures=tuple(pictures))


def pack(lengths: Sequence[int], seq_length: int, packing: bool = True) -> list[list[int]]:
    """Return which documents share a row: for each row its indices into `lengths`; each document is in just one row.

    Best-fit decreasing: longest first, each into the fullest row that still holds it; equal lengths keep
    their order. Next-fit instead in the rare case that it needs fewer rows. packing=False: one document a
    row, in order.
    """
    order, row_ends = pack_arrays(np.asarray(lengths, np.int64), seq_length, packing)
    return [part.tolist() for part in np.split(order, row_ends[:-1])] if len(order) else []


def pack_arrays(lengths: np.ndarray, seq_length: int, packing: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return what `pack` does as arrays: the indices of all rows [D] int64, and where each row ends in them [R] int64.

    lengths  [D] integers
    """
    assert ((lengths > 0) & (lengths <= seq_length)).all(), "a document must fit a row"
    if not packing:
        return np.arange(len(lengths)), np.arange(1, len(lengths) + 1)
    longest_first = np.argsort(-lengths, kind="stable")
    best, next_fit = _best_fit(lengths[longest_first], seq_length), _next_fit(lengths, seq_length)
    if next_fit.max(initial=-1) < best.max(initial=-1):
        longest_first, best = np.arange(len(lengths)), next_fit
    counts = np.bincount(best)
    return longest_first[np.argsort(best, kind="stable")], np.cumsum(counts, dtype=np.int64)


def _best_fit(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Return the row of each document, [D] int32: the fullest that still holds it. lengths: in the order of packing."""
    rows = array("i")
    count = 0
    by_space: dict[int, list[int]] = {}  # free space -> rows with just that much
    spaces: list[int] = []  # the keys of by_space, sorted
    for length in _numbers(lengths):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space, row, count = seq_length, count, count + 1
        else:
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        rows.append(row)
        space -= length
        if space and space not in by_space:
            insort(spaces, space)
            by_space[space] = []
        if space:
            by_space[space].append(row)
    return np.array(rows, np.int32)


def _next_fit(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Return the row of each document, [D] int32: the last one, or a new one where that has no room."""
    rows = array("i")
    space, row = 0, -1
    for length in _numbers(lengths):
        if length > space:
            space, row = seq_length, row + 1
        rows.append(row)
        space -= length
    return np.array(rows, np.int32)


def _numbers(values: np.ndarray) -> Iterator[int]:
    """Yield the values as Python's integers, of which few exist at a time."""
    for first in range(0, len(values), _AT_A_TIME):
        yield from values[first : first + _AT_A_TIME].tolist()


def pack_sides(lengths: np.ndarray, limits: tuple[int, int], packing: bool = True) -> list[list[int]]:
    """Pack documents with two lengths, [D, 2] of source and target, as `pack` does, in rows with a limit of each.

    Longest first by the share of a row that they take, each into the first of the last OPEN_ROWS rows that holds it.
    """
    assert (lengths <= limits).all(), "a document must fit a row"
    if not packing:
        return [[index] for index in range(len(lengths))]
    rows: list[list[int]] = []
    spaces = np.empty((0, 2), np.int64)  # of the rows that are open
    for index in np.argsort(-(lengths / limits).max(1), kind="stable").tolist():
        holds = np.flatnonzero((spaces >= lengths[index]).all(1))
        if not len(holds):
            rows.append([])
            spaces = np.concatenate((spaces[-OPEN_ROWS + 1 :], np.array([limits], np.int64)))
            holds = np.array([len(spaces) - 1])
        at = int(holds[0])
        rows[len(rows) - len(spaces) + at].append(index)
        spaces[at] -= lengths[index]
    return rows


def shift(labels: np.ndarray) -> np.ndarray:
    """Map labels [n] of one document's own tokens to the label to predict at each position; the last has none."""
    return np.append(labels[1:], labels.dtype.type(IGNORE))


def build_rows(
    documents: Sequence[Sample],
    bins: Sequence[Sequence[int]],
    seq_length: int,
    pad_token_id: int,
    sides: Sides | None = None,
) -> PackedRows:
    """Lay `documents` out as `bins` (from `pack` or `pack_sides`) says."""
    source = Documents.of(documents, range(len(documents)))
    members = np.asarray([index for row in bins for index in row], dtype=np.int64)
    row_ends = np.cumsum([len(row) for row in bins], dtype=np.int64)
    top = int(source.ids.max()) if len(source.ids) else 0
    return lay_out(source, members, row_ends, seq_length, pad_token_id, top, sides)


def lay_out(
    source: Documents,
    members: np.ndarray,
    row_ends: np.ndarray,
    seq_length: int,
    pad_token_id: int,
    max_token_id: int,
    sides: Sides | None = None,
) -> PackedRows:
    """Return the rows whose documents are `members`, cut at `row_ends`; see `PackedRows`."""
    tokens, labels = (_sums(counts, members, row_ends) for counts in (source.lengths, source.label_counts))
    weights, of_documents = labels, source.label_weights
    if of_documents is not None:
        assert sides is None, "labels of pairs count 1 each"
        row = np.repeat(np.arange(len(row_ends)), np.diff(row_ends, prepend=0))
        weights = np.bincount(row, of_documents[members], len(row_ends))
    rows = PackedRows(seq_length, pad_token_id, source, members, row_ends, tokens, labels, weights, max_token_id)
    return rows if sides is None else replace(rows, sides=sides)


def _sums(counts: np.ndarray, members: np.ndarray, row_ends: np.ndarray) -> np.ndarray:
    """Return the sum of `counts` [D] over the members of each row, [R] int64; rows may be empty."""
    found = np.zeros(len(row_ends) + 1, np.int64)
    total = done = 0
    for first in range(0, len(row_ends), _AT_A_TIME):  # no large arrays of the moment
        ends = row_ends[first : first + _AT_A_TIME]
        sums = np.cumsum(counts[members[done : ends[-1]]], dtype=np.int64)
        found[first + 1 : first + 1 + len(ends)] = total + np.append(0, sums)[ends - done]
        total, done = found[first + len(ends)], int(ends[-1])
    return np.diff(found)
