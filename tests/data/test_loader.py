"""Steps: every row once an epoch on any split, and the same global batch whatever the number of dp ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacked import stacked

from megalora.data import Loader, Sample, build_rows, steps_ahead

SEQ = 8
PAD = 0


def packed(rows: int):
    """Rows of two documents each, every token of which is unlike any other."""
    documents = []
    for number in range(2 * rows):
        ids = np.arange(1, 2 + number % 4, dtype=np.int32) + 10 * number
        documents.append(Sample(ids, ids))
    return build_rows(documents, [[2 * i, 2 * i + 1] for i in range(rows)], SEQ, PAD)


def loaders(rows, micro, accumulation, dp, seed=3, shuffle=True):
    layout = {"micro_batch_rows": micro, "num_microbatches": accumulation, "dp_size": dp}
    return [Loader(rows, **layout, dp_rank=rank, seed=seed, shuffle=shuffle) for rank in range(dp)]


def global_batch(steps):
    """What a step holds, by token_index: (id, label, position); positions restart at each bound."""
    tokens = {}
    for step in steps:
        for batch in step.microbatches:
            bounds = batch.cu_seqlens.tolist()
            starts = [start for start, stop in zip(bounds, bounds[1:], strict=False) for _ in range(start, stop)]
            place = torch.arange(len(starts)) - torch.tensor(starts)
            values = zip(batch.input_ids.tolist(), batch.labels.tolist(), batch.position_ids.tolist(), strict=True)
            for index, value, inner in zip(batch.token_index.tolist(), values, place.tolist(), strict=True):
                assert index not in tokens and value[2] == inner
                tokens[index] = value
    return tokens


sizes = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), sizes, sizes, sizes, st.integers(0, 2**40), st.booleans())
def test_every_row_exactly_once_an_epoch(count, micro, accumulation, dp, seed, shuffle):
    rows = packed(count)
    ranks = loaders(rows, micro, accumulation, dp, seed, shuffle)
    steps_per_epoch = ranks[0].steps_per_epoch
    assert steps_per_epoch == -(-count // (micro * accumulation * dp))
    for epoch in range(2):
        seen, labels, tokens = [], 0, 0
        for number in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            steps = [rank.step(number) for rank in ranks]
            assert len({(step.label_count, step.token_count) for step in steps}) == 1
            batch = global_batch(steps)
            assert sorted(batch) == list(range(micro * accumulation * dp * SEQ))
            assert steps[0].label_count == sum(label != -100 for _, label, _ in batch.values())
            assert steps[0].token_count == sum(value[0] != PAD for value in batch.values())
            labels, tokens = labels + steps[0].label_count, tokens + steps[0].token_count
            ids = torch.tensor([batch[index][0] for index in range(len(batch))]).view(-1, SEQ)
            seen += [tuple(row) for row in ids.tolist() if any(row)]
        everything = [tuple(row) for row in stacked(rows).input_ids.tolist()]
        assert sorted(seen) == sorted(everything) and (shuffle or seen == everything)
        assert (labels, tokens) == (rows.labelled_tokens, rows.tokens)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([(8, [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2), (1, 2, 4)])]),
)
def test_dp_size_changes_nothing(count, case):
    rows, (total, layouts) = packed(count), case
    for number in range(3):
        batches = []
        for micro, accumulation, dp in layouts:
            assert micro * accumulation * dp == total
            steps = [rank.step(number) for rank in loaders(rows, micro, accumulation, dp)]
            batches.append((global_batch(steps), steps[0].label_count, steps[0].token_count))
        assert all(batch == batches[0] for batch in batches)


def test_rows_of_a_step_lie_as_the_sampler_says():
    rows = packed(8)
    ranks = loaders(rows, 2, 2, 2, shuffle=False)
    for r in range(8):
        microbatch, rank, place = r // 4, r // 2 % 2, r % 2
        batch = ranks[rank].step(0).microbatches[microbatch]
        here = slice(place * SEQ, (place + 1) * SEQ)
        assert batch.input_ids[here].tolist() == rows.row(r).input_ids.tolist()
        assert batch.token_index[here].tolist() == list(range(r * SEQ, (r + 1) * SEQ))


def test_shapes_and_dtypes_are_those_of_a_batch():
    batch = loaders(packed(3), 2, 1, 1)[0].step(1).microbatches[0]
    for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.token_index):
        assert tensor.dtype == torch.int64 and tensor.shape == (2 * SEQ,)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[-1] == 2 * SEQ
    assert {SEQ} <= set(batch.cu_seqlens.tolist())
    assert (batch.labels[SEQ:] == -100).all() and batch.input_ids[SEQ:].tolist() == [PAD] * SEQ


def test_weights_of_labels_are_shifted_with_them():
    """And the count of a step is their sum over the whole global batch; documents without weights count 1."""
    ids = np.arange(1, 5, dtype=np.int32)
    some = Sample(ids, np.where(ids > 1, ids, -100), weights=np.float32([0, 0.5, 2, 2]))
    rows = build_rows([some, Sample(ids[:2], ids[:2])], [[0, 1], [1]], SEQ, PAD)
    steps = [loader.step(0) for loader in loaders(rows, 1, 1, 2, shuffle=False)]
    assert [step.label_count for step in steps] == [6.5, 6.5] and rows.labelled_tokens == 5
    first, second = (step.microbatches[0] for step in steps)
    assert first.weights.tolist() == [0.5, 2, 2, 0, 1, 0, 0, 0] and second.weights.tolist() == [1, *[0] * 7]
    assert first.labels.tolist() == [2, 3, 4, -100, 2, -100, -100, -100]
    plain = loaders(packed(2), 1, 1, 1)[0].step(0)
    assert plain.microbatches[0].weights is None and isinstance(plain.label_count, int)


def test_a_step_does_not_depend_on_the_steps_before_it():
    rows = packed(9)
    walked, fresh = loaders(rows, 2, 1, 1)[0], loaders(rows, 2, 1, 1)[0]
    steps = [walked.step(number) for number in range(12)]
    for number in (11, 3, 7):
        assert torch.equal(fresh.step(number).microbatches[0].input_ids, steps[number].microbatches[0].input_ids)


def test_epochs_and_seeds_differ():
    rows = packed(30)
    one, other = loaders(rows, 30, 1, 1)[0], loaders(rows, 30, 1, 1, seed=4)[0]
    batches = [one.step(0), one.step(1), other.step(0)]
    assert len({tuple(step.microbatches[0].input_ids.tolist()) for step in batches}) == 3


def test_steps_are_made_one_ahead_and_in_order():
    made = []
    steps = steps_ahead(lambda number: made.append(number) or number, 3, 7)
    assert next(steps) == 3 and made[0] == 3 and len(made) <= 2
    assert list(steps) == [4, 5, 6] and made == [3, 4, 5, 6]
    assert list(steps_ahead(made.append, 5, 5)) == []


def test_what_fails_in_a_step_is_raised_where_it_is_taken():
    steps = steps_ahead(lambda number: 1 // (2 - number), 0, 4)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(steps)


def test_long_documents_are_spread_over_the_ranks_and_keep_their_numbers():
    """Of every four rows two are one document; by number both would fall to rank 0."""
    documents = [Sample(ids, ids) for n in (SEQ, SEQ // 4) for ids in [np.arange(1, n + 1, dtype=np.int32)]]
    rows = build_rows(documents, [[0], [1, 1, 1, 1]] * 4, SEQ, PAD)
    sizes = {"micro_batch_rows": 1, "num_microbatches": 4, "dp_size": 2}
    for token_work, longest in ((1e9, [4, 0]), (1.0, [2, 2])):
        ranks = [
            Loader(rows, **sizes, dp_rank=rank, seed=0, shuffle=False, token_work=token_work).step(0).microbatches
            for rank in range(2)
        ]
        assert [sum(len(batch.cu_seqlens) == 2 for batch in batches) for batches in ranks] == longest
        numbers = {int(b.token_index[0]) // SEQ: len(b.cu_seqlens) == 2 for batches in ranks for b in batches}
        assert numbers == {number: number % 2 == 0 for number in range(8)}
