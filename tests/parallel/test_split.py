"""Split: where one rank's part of a parameter lies, and which of it the rank counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megalora.models.spec import Blocked, ByGroup, ByHead
from megalora.parallel.mesh import Axis
from megalora.parallel.split import (
    Split,
    cut_heads,
    even_part,
    joined_cut,
    named_splits,
    runs_of,
    shard_range,
    whole_split,
)


def axis(rank: int, size: int) -> Axis:
    return Axis(rank, tuple(range(size)))


@given(size=st.integers(0, 200), parts=st.integers(1, 17))
def test_ranges_are_contiguous_and_as_even_as_possible(size, parts):
    ranges = [shard_range(size, part, parts) for part in range(parts)]
    assert [i for a, b in ranges for i in range(a, b)] == list(range(size))
    lengths = [b - a for a, b in ranges]
    assert max(lengths) - min(lengths) <= 1


@given(eights=st.integers(0, 4000), parts=st.integers(1, 17), more=st.sampled_from([0, 0, 3]))
def test_pieces_in_eights_where_there_are_many(eights, parts, more):
    size = 8 * eights + more
    ranges = [shard_range(size, part, parts, 8) for part in range(parts)]
    lengths = [b - a for a, b in ranges]
    assert [a for a, _ in ranges] == [0, *(b for _, b in ranges)][:parts] and ranges[-1][1] == size
    if more or eights < 8 * parts:
        assert max(lengths) - min(lengths) <= 1
    else:
        assert all(length % 8 == 0 for length in lengths) and max(lengths) - min(lengths) <= 8


@given(size=st.integers(1, 30), tp=st.integers(1, 9), dim=st.integers(0, 1), times=st.integers(1, 4))
def test_the_parts_of_all_ranks_make_the_whole(size, tp, dim, times):
    shape = (size * times, 7) if dim == 0 else (7, size * times)
    whole = torch.arange(size * times * 7).view(shape)
    rebuilt = torch.full(shape, -1)
    for rank in range(tp):
        split = even_part(size, axis(rank, tp)).times(times).cut().split(shape, dim)
        part = split.slice(whole)
        assert tuple(part.shape) == split.local_shape
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() or not part.numel(), "a view"
        (owned,) = split.owned(part) or (part,)
        assert owned.equal(part) and not split.partial_grad
        split.put(rebuilt, part)
    assert rebuilt.equal(whole)


def test_a_whole_parameter_is_counted_by_the_first_rank():
    whole = torch.arange(12.0).view(4, 3)
    splits = [whole_split((4, 3), axis(rank, 3), partial_grad=True) for rank in range(3)]
    assert all(split.slice(whole).equal(whole) and split.partial_grad for split in splits)
    assert [sum(part.numel() for part in split.owned(whole)) for split in splits] == [12, 0, 0]
    alone = whole_split((4, 3), axis(0, 1), partial_grad=True)
    assert not alone.partial_grad, "one rank has the whole gradient"


def test_a_shared_part_is_counted_where_it_is_owned():
    split = Split((10, 2), 0, ((4, 1, 4, 0),), own=((2, 4),), partial_grad=True)
    part = torch.arange(8.0).view(4, 2)
    assert [own.tolist() for own in split.owned(part)] == [[[4.0, 5.0], [6.0, 7.0]]]
    row = Split((2, 10), 1, ((4, 1, 4, 0),), own=((0, 1),))
    assert [own.tolist() for own in row.owned(part.t())] == [[[0.0], [1.0]]]


KV = st.sampled_from([(8, 8), (8, 4), (8, 2), (6, 3), (9, 3), (4, 1)])


@given(
    heads=KV,
    tp=st.integers(1, 9),
    size=st.integers(1, 3),
    dim=st.integers(0, 1),
    kind=st.sampled_from(["q k v", "by head", "by group"]),
)
def test_fused_rows_of_all_ranks_make_the_whole(heads, tp, size, dim, kind):
    """q, k and v of a rank's heads lie here one after another, wherever the file has them; each row counts once."""
    count, kv = heads if kind != "by head" else (heads[0], heads[0])
    rows = {
        "q k v": Blocked((("q", count), ("k", kv), ("v", kv)), size),
        "by head": ByHead(size),
        "by group": ByGroup(count // kv, size),
    }[kind]
    total = (count + 2 * kv) * size
    shape = (total, 5) if dim == 0 else (5, total)
    whole = torch.arange(total * 5).view(shape)
    rebuilt, counts = torch.full(shape, -1), torch.zeros(shape)
    for rank in range(min(tp, count)):
        cut = cut_heads(count, kv, axis(rank, min(tp, count)))
        parts = [("q", cut.query), ("k", cut.kv), ("v", cut.kv)]
        joined = joined_cut([(part, rows.unit(n), rows.pieces(n, part.start, part.stop)) for n, part in parts])
        split = joined.split(shape, dim)
        part = split.slice(whole)
        assert tuple(part.shape) == split.local_shape
        split.put(rebuilt, part)
        seen = torch.zeros(part.shape)
        for own in split.owned(seen):
            own.add_(1)
        for theirs, ours in split.blocks():
            counts[theirs] += seen[ours]
        local = 0
        for name, held in parts:
            for head in range(held.start, held.stop):
                (run,) = runs_of(rows.pieces(name, head, head + 1))
                assert part.narrow(dim, local, size).equal(whole.narrow(dim, run.start, size))
                local += size
    assert rebuilt.equal(whole) and counts.eq(1).all()


def test_a_tensor_of_another_shape_is_our_own_bug():
    with pytest.raises(AssertionError):
        Split.range((4, 4), 0, 0, 2).slice(torch.zeros(4, 5))


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))

    def shard_dims(self) -> dict[str, Split]:
        return {"weight": Split.range((4, 3), 0, 2, 4)}


def test_every_parameter_below_a_module_has_a_split():
    module = nn.ModuleDict({"a": Cut(), "b": nn.ModuleList([nn.Linear(3, 5), Cut()])})
    module["c"] = nn.Linear(3, 5, bias=False)
    module["c"].weight = module["b"][0].weight  # tied: both names have one
    splits = named_splits(module)
    assert set(splits) == {"a.weight", "b.0.weight", "b.0.bias", "b.1.weight", "c.weight"}
    assert splits["a.weight"] == splits["b.1.weight"] == Split.range((4, 3), 0, 2, 4)
    assert splits["b.0.bias"] == Split((5,)) and splits["c.weight"].local_shape == (5, 3)
