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

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .template import IGNORE, Sample


@dataclass(frozen=True)
class PackedRows:
    """R rows of S = seq_length tokens, ready to be batched.

    input_ids, labels (shifted), position_ids   [R, S] int32
    document_lengths   per row, the lengths of its documents with the padding tail; each sums to S
    row_tokens, row_labels   per row, how many tokens are not padding and how many labels are not -100
    documents, tokens, labelled_tokens   counts over all rows (padding not counted)
    skipped   a line for each row of the file that was left out, with the reason
    fingerprint   sha256 of the documents in the file's order, seq_length and packing: the data's identity
    """

    seq_length: int
    pad_token_id: int
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_lengths: tuple[tuple[int, ...], ...]
    row_tokens: tuple[int, ...]
    row_labels: tuple[int, ...]
    documents: int
    skipped: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def rows(self) -> int:
        return len(self.document_lengths)

    @property
    def tokens(self) -> int:
        return sum(self.row_tokens)

    @property
    def labelled_tokens(self) -> int:
        return sum(self.row_labels)


def pack(lengths: Sequence[int], seq_length: int, packing: bool = True) -> list[list[int]]:
    """Which documents share a row: for each row its indices into `lengths`; each document is in just one row.

    Best-fit decreasing: longest first, each into the fullest row that still holds it; equal lengths keep
    their order. Next-fit instead in the rare case that it needs fewer rows. packing=False: one document a
    row, in order.
    """
    assert all(0 < length <= seq_length for length in lengths), "a document must fit a row"
    if not packing:
        return [[index] for index in range(len(lengths))]
    return min(_best_fit_decreasing(lengths, seq_length), _next_fit(lengths, seq_length), key=len)


def _best_fit_decreasing(lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free space -> rows with just that much
    spaces: list[int] = []  # the keys of by_space, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(spaces, lengths[index])
        if at == len(spaces):
            space, row = seq_length, len(rows)
            rows.append([])
        else:
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        rows[row].append(index)
        space -= lengths[index]
        if space and space not in by_space:
            insort(spaces, space)
            by_space[space] = []
        if space:
            by_space[space].append(row)
    return rows


def _next_fit(lengths: Sequence[int], seq_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    space = 0
    for index, length in enumerate(lengths):
        if length > space:
            rows.append([])
            space = seq_length
        rows[-1].append(index)
        space -= length
    return rows


def shift(labels: np.ndarray) -> np.ndarray:
    """Labels [n] of one document's own tokens -> the label to predict at each position; the last has none."""
    return np.append(labels[1:], labels.dtype.type(IGNORE))


def build_rows(
    documents: Sequence[Sample], bins: Sequence[Sequence[int]], seq_length: int, pad_token_id: int
) -> PackedRows:
    """Lay `documents` out as `bins` (from `pack`) says."""
    shape = (len(bins), seq_length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int32)
    labels = np.full(shape, IGNORE, dtype=np.int32)
    position_ids = np.empty(shape, dtype=np.int32)
    positions = np.arange(seq_length, dtype=np.int32)
    all_lengths, row_tokens = [], []
    for row, members in enumerate(bins):
        lengths, at = [], 0
        for index in members:
            document = documents[index]
            stop = at + len(document.input_ids)
            assert stop <= seq_length, "a row is over-full"
            input_ids[row, at:stop] = document.input_ids
            labels[row, at:stop] = shift(document.labels)
            position_ids[row, at:stop] = positions[: stop - at]
            lengths.append(stop - at)
            at = stop
        row_tokens.append(at)
        if at < seq_length:
            position_ids[row, at:] = positions[: seq_length - at]
            lengths.append(seq_length - at)
        all_lengths.append(tuple(lengths))
    return PackedRows(
        seq_length=seq_length,
        pad_token_id=pad_token_id,
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_lengths=tuple(all_lengths),
        row_tokens=tuple(row_tokens),
        row_labels=tuple((labels != IGNORE).sum(axis=1).tolist()),
        documents=sum(len(members) for members in bins),
    )
