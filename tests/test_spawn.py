"""The helper of the multi-process tests: results, errors, deaths and hangs of its ranks."""

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from spawn import SpawnError, spawn


@dataclass(frozen=True)
class Point:
    x: int


def total(rank, world_size, values, point):
    tensor = values + rank
    dist.all_reduce(tensor)
    return rank, tensor, Point(point.x + 1)


def leaves_a_patch(rank, world_size):
    before = getattr(torch, "left_by_a_test", None)
    torch.left_by_a_test = rank
    return before, os.getpid(), torch.get_num_threads()


def one_raises(rank, world_size):
    if rank == 1:
        print("about to fail")
        raise ValueError("rank one had enough")
    dist.barrier()


def one_dies(rank, world_size):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def one_hangs(rank, world_size):
    if rank == 1:
        print("sleeping", flush=True)
        time.sleep(600)


def unpicklable(rank, world_size):
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_results_come_in_rank_order(world_size):
    values = torch.tensor([1.0, 0.1], dtype=torch.float64)
    results = spawn(total, world_size, values, Point(4))
    for rank, (got_rank, tensor, point) in enumerate(results):
        assert got_rank == rank
        torch.testing.assert_close(tensor, values * world_size + sum(range(world_size)))
        assert point == Point(5)


def test_each_call_has_fresh_processes_of_one_thread():
    calls = [spawn(leaves_a_patch, 2) for _ in range(2)]
    assert len({pid for call in calls for _, pid, _ in call}) == 4
    assert all(before is None and threads == 1 for call in calls for before, _, threads in call)


def test_an_exception_brings_its_traceback_and_output():
    start = time.monotonic()
    with pytest.raises(SpawnError, match="rank 1 of 3") as error:
        spawn(one_raises, 3)
    assert "in one_raises" in str(error.value)
    assert "ValueError: rank one had enough" in str(error.value)
    assert "about to fail" in str(error.value)
    assert time.monotonic() - start < 60, "the other ranks wait in a barrier and must have been killed"


def test_a_rank_that_dies_is_named():
    with pytest.raises(SpawnError, match="rank 1 of 2:\nthe process ended with exit status 7"):
        spawn(one_dies, 2)


def test_a_hang_ends_at_the_timeout():
    for seconds in (2, 10, 50):  # enough for the ranks to get there, where the machine is busy
        start = time.monotonic()
        with pytest.raises(SpawnError, match=rf"no result within {seconds} s from ranks \[0, 1\]\n") as error:
            spawn(one_hangs, 2, timeout=seconds)
        assert time.monotonic() - start < seconds + 60
        if "output of rank 1 ---\nsleeping" in str(error.value):
            break
    assert "in one_hangs" in str(error.value), "it must say where the rank stood"


def test_a_result_must_be_picklable():
    with pytest.raises(SpawnError, match="pickle"):
        spawn(unpicklable, 1)


def test_only_functions_of_a_module():
    with pytest.raises(TypeError, match="top level"):
        spawn(lambda rank, world_size: None, 1)


def test_works_after_failures():
    assert [rank for rank, _, _ in spawn(total, 2, torch.zeros(1), Point(0))] == [0, 1]
