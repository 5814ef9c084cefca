"""Packing loses no document, over-fills no row, and lays rows out as the drawing in packing.py says."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stacked import stacked

from megalora.data import Sample, build_rows, pack, packing


def next_fit(lengths, seq_length):
    rows, space = 0, 0
    for length in lengths:
        if length > space:
            rows, space = rows + 1, seq_length
        space -= length
    return rows


def sample(ids, trained):
    """A document whose last `trained` tokens are the reply."""
    ids = np.asarray(ids, dtype=np.int32)
    labels = ids.copy()
    labels[: len(ids) - trained] = -100
    return Sample(ids, labels)


documents_of = st.lists(st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_each_document_once_no_row_over_no_more_rows_than_next_fit(lengths, seq_length):
    bins = pack(lengths, seq_length)
    assert sorted(index for row in bins for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= seq_length for row in bins)
    assert len(bins) <= next_fit(lengths, seq_length)
    assert bins == pack(lengths, seq_length)
    assert pack(lengths, seq_length, packing=False) == [[index] for index in range(len(lengths))]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_rows_never_change(lengths, seq_length):
    """Best fit as a list of lists, written plainly: another order would make every resumed run see other rows."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space, when it came about), of the rows
    for count, index in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        holds = [(space, -when, row) for row, (space, when) in enumerate(spaces) if space >= lengths[index]]
        if not holds:
            rows.append([])
            spaces.append((seq_length, count))
        row = min(holds)[2] if holds else len(rows) - 1
        rows[row].append(index)
        spaces[row] = (spaces[row][0] - lengths[index], count)
    if len(rows) <= next_fit(lengths, seq_length):
        assert pack(lengths, seq_length) == rows
    found = pack(lengths, seq_length)
    with mock.patch.object(packing, "_AT_A_TIME", 3):
        assert pack(lengths, seq_length) == found


def test_sums_of_rows():
    counts, members = np.array([5, 7, 11, 13]), np.array([3, 0, 1, 1, 2])
    for size in (1, 2, 100):
        with mock.patch.object(packing, "_AT_A_TIME", size):
            assert packing._sums(counts, members, np.array([0, 2, 2, 5])).tolist() == [0, 18, 0, 25]
            assert packing._sums(counts, members[:0], np.array([0])).tolist() == [0]


def test_next_fit_where_it_is_better():
    assert len(pack([6, 3, 3, 4, 4, 4], 12)) == 2


def test_too_long_a_document_is_our_bug():
    with pytest.raises(AssertionError):
        pack([5], 4)


def test_the_drawing():
    documents = [sample([11, 12, 13, 14], 2), sample([21, 22, 23], 2), sample([31, 32], 1)]
    rows = build_rows(documents, [[0, 1], [2]], 8, 0)
    none = -100
    laid = stacked(rows)
    assert laid.input_ids.tolist() == [[11, 12, 13, 14, 21, 22, 23, 0], [31, 32, 0, 0, 0, 0, 0, 0]]
    assert laid.labels.tolist() == [
        [none, 13, 14, none, 22, 23, none, none],
        [32, none, none, none, none, none, none, none],
    ]
    assert laid.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert laid.lengths == ((4, 3, 1), (2, 6))
    assert (rows.row_tokens.tolist(), rows.row_labels.tolist()) == ([7, 2], [4, 1])
    assert (rows.documents, rows.rows, rows.tokens, rows.labelled_tokens) == (3, 2, 9, 5)


@settings(max_examples=150, deadline=None)
@given(documents_of, st.booleans())
def test_unpacking_gives_the_documents_back(shapes, packing):
    documents = [sample(np.arange(n) + 100 * i + 1, trained) for i, (n, trained) in enumerate(shapes)]
    bins = pack([n for n, _ in shapes], 16, packing)
    rows = build_rows(documents, bins, 16, 0)
    for number, members in enumerate(bins):
        row = rows.row(number)
        assert sum(row.lengths) == 16
        at = 0
        for place, index in enumerate(members):
            document, n = documents[index], len(documents[index].input_ids)
            assert row.lengths[place] == n
            assert row.input_ids[at : at + n].tolist() == document.input_ids.tolist()
            assert row.labels[at : at + n].tolist() == [*document.labels[1:].tolist(), -100]
            assert row.position_ids[at : at + n].tolist() == list(range(n))
            at += n
        assert rows.row_tokens[number] == at and (row.labels[at:] == -100).all()
        assert row.position_ids[at:].tolist() == list(range(16 - at))
        assert rows.row_labels[number] == (row.labels != -100).sum()
    assert rows.labelled_tokens == sum(int((d.labels[1:] != -100).sum()) for d in documents)
