"""How long the ranks of a mesh wait for one another."""

import datetime
import time

import pytest
import torch
from spawn import spawn

from megalora.parallel.collectives import all_reduce
from megalora.parallel.mesh import build_mesh


def late(rank: int, world_size: int, seconds: float) -> str:
    mesh = build_mesh(rank, world_size, tp=2, patience=datetime.timedelta(seconds=seconds))
    if rank == 1:
        time.sleep(2.5)
    try:
        return str(all_reduce(torch.ones(1), mesh.tp).item())
    except RuntimeError:
        return "given up"


@pytest.mark.parametrize("seconds, ends", [(0.5, "given up"), (60.0, "2.0")])
def test_a_rank_waits_as_long_as_it_is_told(seconds, ends):
    assert spawn(late, 2, seconds)[0] == ends
