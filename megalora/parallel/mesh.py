"""The process mesh: which ranks share tensors (tp), rows (dp) and layers (pp) with this one."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist

from megalora.errors import UserError

Clock = Callable[[str], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh as this rank sees it.

    rank   position of this rank on the axis, 0 .. size-1
    ranks  the global ranks on the axis, in order
    group  their process group; None where the axis has one rank (or no processes exist, as on the meta device)
    clock  `clock("communication")` is a context manager that times a phase; None: not timed
    """

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    clock: Clock | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def timed(self) -> contextlib.AbstractContextManager:
        """Time what runs inside as communication, where the run asked for it."""
        return contextlib.nullcontext() if self.clock is None else self.clock("communication")


@dataclass(frozen=True)
class ParallelMesh:
    """pp x dp x cp x tp ranks, the innermost next to one another: rank = ((pp * DP + dp) * CP + cp) * TP + tp.

    replicas  dp and cp together: the ranks that hold the same parameters, over which their gradients are summed
    """

    pp: Axis = Axis()
    dp: Axis = Axis()
    cp: Axis = Axis()
    tp: Axis = Axis()
    replicas: Axis = Axis()
    world: Axis = Axis()

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size


def layout(world_size: int, tp: int, pp: int, cp: int = 1) -> dict[str, list[tuple[int, ...]]]:
    """Return the rank tuples of every axis group of a mesh, by axis name.

    Raises UserError where tp * pp * cp does not divide the world size.
    """
    model = tp * pp * cp
    if world_size % model:
        context = f" * context_parallel_size ({cp})" if cp > 1 else ""
        raise UserError(
            f"World size ({world_size}) is not a multiple of tensor_parallel_size ({tp}) * pipeline_parallel_size "
            f"({pp}){context} = {model}",
            f"start a multiple of {model} processes or change the {'three' if cp > 1 else 'two'} sizes",
        )
    dp = world_size // model

    def rank(p: int, d: int, c: int, t: int) -> int:
        return ((p * dp + d) * cp + c) * tp + t

    P, D, C, T = range(pp), range(dp), range(cp), range(tp)
    found = {
        "tp": [tuple(rank(p, d, c, t) for t in T) for p in P for d in D for c in C],
        "dp": [tuple(rank(p, d, c, t) for d in D) for p in P for c in C for t in T],
        "pp": [tuple(rank(p, d, c, t) for p in P) for d in D for c in C for t in T],
    }
    if cp > 1:
        found["cp"] = [tuple(rank(p, d, c, t) for c in C) for p in P for d in D for t in T]
        found["replicas"] = [tuple(rank(p, d, c, t) for d in D for c in C) for p in P for t in T]
    return found


def build_mesh(
    rank: int,
    world_size: int,
    tp: int = 1,
    pp: int = 1,
    clock: Clock | None = None,
    patience: datetime.timedelta | None = None,
    cp: int = 1,
) -> ParallelMesh:
    """Return the mesh of this rank. Collective: every rank of the world calls it, after init_process_group.

    patience  how long a rank waits for the others of an axis; None: torch's default
    With one process no process group is needed. Raises UserError where the sizes do not fit.
    """
    axes = {}
    for name, groups in layout(world_size, tp, pp, cp).items():
        for ranks in groups:  # every rank creates every group, in one order: torch.distributed asks for it
            group = dist.new_group(list(ranks), timeout=patience) if len(ranks) > 1 else None
            if rank in ranks:
                axes[name] = Axis(ranks.index(rank), ranks, group, clock)
    world_group = dist.group.WORLD if world_size > 1 else None
    axes.setdefault("replicas", axes["dp"])
    return ParallelMesh(**axes, world=Axis(rank, tuple(range(world_size)), world_group, clock))


def own_group(axis: Axis, timeout: datetime.timedelta) -> Axis:
    """Return the same ranks with a gloo process group of their own, so that a thread may talk beside the training.

    Collective over the world: `axis` is the world's.
    """
    group = dist.new_group(list(axis.ranks), timeout=timeout, backend="gloo") if axis.size > 1 else None
    return Axis(axis.rank, axis.ranks, group)
