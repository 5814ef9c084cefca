"""How documents are cut over context-parallel ranks."""

import random

import pytest
import torch

from megalora.batch import Batch
from megalora.data.context import cut_batch, cut_documents


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_once_as_many_on_each_rank_and_balanced(ranks, seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 12))]
    lengths.append(-sum(lengths) % ranks or ranks)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    pieces = cut_documents(bounds, ranks)
    tokens = [[t for piece in own for t in range(piece.start, piece.stop)] for own in pieces]
    assert sorted(t for own in tokens for t in own) == list(range(bounds[-1]))
    assert {len(own) for own in tokens} == {bounds[-1] // ranks}
    for own in pieces:
        assert all(b in bounds and b <= piece.start < piece.stop for piece in own for b in [piece.document])
    keys = [sum(t - piece.document + 1 for piece in own for t in range(piece.start, piece.stop)) for own in pieces]
    assert max(keys) - min(keys) <= sum(lengths) + 4 * max(lengths) * ranks  # of about sum(length ** 2) / 2 / ranks


def test_one_long_document_is_balanced_within_a_percent():
    pieces = cut_documents([0, 4096], 4)
    keys = [sum(t + 1 for piece in own for t in range(piece.start, piece.stop)) for own in pieces]
    assert max(keys) / min(keys) < 1.01


def test_the_cut_of_a_batch_puts_all_back_together():
    total, ranks = 24, 3
    bounds = torch.tensor([0, 8, 13, 24], dtype=torch.int32)
    whole = Batch(*(torch.arange(total) + 100 * i for i in range(3)), bounds, torch.arange(total) + 7)
    parts = [cut_batch(whole, rank, ranks) for rank in range(ranks)]
    for name in ("input_ids", "labels", "position_ids", "token_index"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined[parts[0].context.place], getattr(whole, name)), name
    for part in parts:
        assert part.cu_seqlens.diff().tolist() == list(part.context.lengths) and len(part.input_ids) == total // ranks
        ends = torch.tensor(part.context.lengths).cumsum(0) - 1
        assert (part.input_ids[ends] + 1).tolist() == list(part.context.stops)
