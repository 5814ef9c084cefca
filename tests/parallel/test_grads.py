"""FlatGradients: what is summed over which ranks, and the norm in which every element counts once."""

from __future__ import annotations

import pytest
import torch
from spawn import spawn
from torch import nn

from megalora.parallel.collectives import all_reduce
from megalora.parallel.grads import FlatGradients
from megalora.parallel.mesh import ParallelMesh, build_mesh
from megalora.parallel.split import Part, Split, even_part, whole_split


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in {"a": (2, 3), "b": (4,), "c": (1, 5)}.items()}


def splits_of(named: dict[str, nn.Parameter], **partial: bool) -> dict[str, Split]:
    return {n: Split(tuple(p.shape), partial_grad=partial.get(n, False)) for n, p in named.items()}


def test_gradients_are_views_of_one_buffer():
    named = parameters()
    flat = FlatGradients(named, splits_of(named, b=True), ParallelMesh())
    assert flat.buffer.numel() == 15
    (named["a"].sum() + 2 * named["b"].sum()).backward()
    assert flat.buffer.sum() == 6 + 8
    for p in named.values():
        assert p.grad.untyped_storage().data_ptr() == flat.buffer.untyped_storage().data_ptr()
    (named["a"].sum()).backward()
    assert named["a"].grad.eq(2).all(), "gradients add up until zero()"
    flat.buffer.mul_(0.5)
    assert named["a"].grad.eq(1).all()
    flat.zero()
    assert not flat.buffer.any() and not named["b"].grad.any()


def test_zero_hangs_the_views_back():
    named = parameters()
    flat = FlatGradients(named, splits_of(named), ParallelMesh())
    named["a"].grad = None
    flat.zero()
    named["a"].sum().backward()
    assert flat.buffer.sum() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_buffer_has_the_masters_dtype(dtype):
    named = {"a": nn.Parameter(torch.zeros(3, dtype=dtype))}
    assert FlatGradients(named, splits_of(named), ParallelMesh()).buffer.dtype == dtype


def test_a_stage_without_trainables():
    flat = FlatGradients({}, {}, ParallelMesh())
    flat.zero()
    flat.reduce()
    assert flat.square_sum() == 0 and flat.buffer.numel() == 0
    assert FlatGradients({}, {}, ParallelMesh(), "meta").square_sum().device.type == "meta"  # where the stage's loss is


def test_one_rank_changes_nothing_and_counts_in_float64():
    named = {"a": nn.Parameter(torch.zeros(100_000))}
    flat = FlatGradients(named, splits_of(named, a=True), ParallelMesh())
    flat.buffer.fill_(0.1)
    before = flat.buffer.clone()
    flat.reduce()
    assert flat.buffer.equal(before)
    square = flat.square_sum()
    assert square.dtype == torch.float64
    assert abs(square - 100_000 * before[0].double() ** 2) < 1e-9


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    for bad in (float("nan"), float("inf")):
        named = parameters()
        flat = FlatGradients(named, splits_of(named), ParallelMesh())
        named["c"].grad[0, 3] = bad
        assert not flat.square_sum().isfinite()


# ---- on a mesh of 2 x 2: dp outside, tp inside

KV = {0: (Part(0, 2, 0, 2, shared=True)), 1: (Part(1, 3, 2, 3, shared=True))}  # three rows, the middle one on both


def meshed(rank: int, world_size: int) -> tuple[dict, float]:
    mesh = build_mesh(rank, world_size, tp=2)
    tp = mesh.tp
    splits = {
        "cut": even_part(5, tp).cut().split((5, 2), 0),
        "cut columns": even_part(4, tp).cut().split((2, 4), 1),
        "partial": whole_split((3, 2), tp, partial_grad=True),
        "same on all": whole_split((4,), tp),
        "shared rows": KV[tp.rank].cut().split((3, 2), 0),
    }
    named = {n: nn.Parameter(torch.zeros(s.local_shape, dtype=torch.float64)) for n, s in splits.items()}
    flat = FlatGradients(named, splits, mesh)
    for p in named.values():
        p.grad.fill_(10.0**rank)
    named["same on all"].grad.fill_(10.0 ** (2 * mesh.dp.rank))  # so it is on all ranks of a tp group
    flat.reduce()
    square = all_reduce(flat.square_sum(), mesh.world)
    return {n: p.grad.clone() for n, p in named.items()}, square.item()


def test_what_is_summed_over_what():
    """Rank r brings 10^r, so that each digit of a sum tells whether r is in it. Rank = 2 dp + tp."""
    results = spawn(meshed, 4)
    for rank, (grads, _) in enumerate(results):
        own = 101.0 if rank % 2 == 0 else 1010.0  # over dp alone
        assert grads["cut"].eq(own).all() and grads["cut columns"].eq(own).all()
        assert grads["partial"].eq(1111).all()
        assert grads["same on all"].eq(101).all()
        shared = [own, 1111.0] if rank % 2 == 0 else [1111.0, own]
        assert grads["shared rows"].tolist() == [[value] * 2 for value in shared]
    whole = {
        "cut": [101.0] * 4 + [1010.0] * 6,
        "cut columns": [101.0] * 4 + [1010.0] * 4,
        "partial": [1111.0] * 6,
        "same on all": [101.0] * 4,
        "shared rows": [101.0] * 2 + [1111.0] * 2 + [1010.0] * 2,
    }
    square = sum(value**2 for values in whole.values() for value in values)
    assert [found for _, found in results] == pytest.approx([square] * 4, rel=1e-14)
