"""Which processes a mesh needs, and how long its ranks wait for one another."""

import datetime
import re
import time

import pytest
import torch
from spawn import spawn
from waiting import PATIENCE

from megalora.errors import UserError
from megalora.parallel.collectives import all_reduce
from megalora.parallel.mesh import build_mesh, layout


def late(rank: int, world_size: int, seconds: float, by: float) -> str:
    mesh = build_mesh(rank, world_size, tp=2, patience=datetime.timedelta(seconds=seconds))
    if rank == 1:
        time.sleep(by)
    try:
        return str(all_reduce(torch.ones(1), mesh.tp).item())
    except RuntimeError:
        return "given up"


# The ranks of a busy machine may be a moment apart when they make their groups, with the same patience.
@pytest.mark.parametrize("seconds, by, ends", [(3.0, 7.0, "given up"), (PATIENCE, 0.5, "2.0")])
def test_a_rank_waits_as_long_as_it_is_told(seconds, by, ends):
    assert spawn(late, 2, seconds, by)[0] == ends


@pytest.mark.parametrize(
    ("sizes", "told", "hint"),
    [
        ((4, 1, 1, 3), r"\* context_parallel_size \(3\) = 3", "a multiple of 3 processes or change the three"),
        ((4, 2, 2, 2), r"context_parallel_size \(2\) = 8", "start a multiple of 8 processes"),
        ((6, 4, 1, 1), r"pipeline_parallel_size \(1\) = 4$", "change the two sizes"),
    ],
)
def test_processes_that_the_sizes_do_not_divide(sizes, told, hint):
    with pytest.raises(UserError) as refused:
        layout(*sizes)
    assert re.search(told, refused.value.message) and hint in refused.value.hint
