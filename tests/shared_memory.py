"""A link of processes on CPUs for `megalora.parallel.exchange`: memory that all map, and barriers of gloo.

What a GPU would do later is done at once, so this proves what is copied where, and that no rank reads before it has met
the writers; not that nothing is written too soon on a stream beside.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from megalora.parallel.collectives import broadcast_object
from megalora.parallel.mesh import Axis


class SharedMemory:
    def __init__(self, axis: Axis):
        self._axis, self._ranks = axis, []

    def memory(self, nbytes: int) -> list[torch.Tensor]:
        if not self._ranks or len(self._ranks[0]) < nbytes:
            self._ranks = self._made(nbytes)
        return [memory[:nbytes] for memory in self._ranks]

    def _made(self, nbytes: int) -> list[torch.Tensor]:
        folder = tempfile.mkdtemp(prefix="link-", dir="/dev/shm") if self._axis.is_first else None
        folder = Path(broadcast_object(folder, self._axis))
        paths = [folder / str(rank) for rank in range(self._axis.size)]
        paths[self._axis.rank].write_bytes(b"\xff" * nbytes)  # not a number, for whoever reads too soon
        self.meet()
        ranks = [torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8) for path in paths]
        self.meet()
        if self._axis.is_first:  # what is mapped stays
            shutil.rmtree(folder)
        return ranks

    def meet(self) -> None:
        dist.barrier(group=self._axis.group)

    def beside(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def join(self) -> None:
        pass
