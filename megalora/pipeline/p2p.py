"""Activations and gradients between neighbouring stages, of one static shape, under way while the stages compute."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from megalora.parallel.mesh import ParallelMesh, layout
from megalora.pipeline.actions import (
    RECEIVES,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    SENDS,
    Action,
)

# On one line; a further send waits for the oldest, so that no stage fills memory by running ahead.
SENDS_UNDER_WAY = 2
AHEAD = 2  # computes that a receive is posted early where it costs nothing but its buffer
LANE_MULTIPROCESSORS = 4  # enough for what a link carries while a stage computes
_KINDS = ("activations", "gradients")
_DOWN = (SEND_FORWARD, RECV_BACKWARD)  # what has its other end at the next stage


def _lane_options(backend: str | None) -> object:
    """Return the options on NCCL with which a receive that waits for its message holds few of the GPU's multiprocessors
    meanwhile.
    """
    if backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = LANE_MULTIPROCESSORS
    return options


class Neighbours:
    """The lines of one stage: for each neighbour and each kind (activations down, gradients up), messages in order.

    A receive is posted before its message is due, a send is handed over; only `take` waits, for a message that has not
    come. Lines wait for nothing of one another: on gloo their messages have tags, on NCCL, where the messages of a
    group form one queue, each line of a rank has a group (a lane) of its own.

    shape, dtype, device  of every message: [T, hidden_size] in the compute dtype
    ring                  whether the last stage sends to the first too (several chunks of layers a stage)
    lanes                 whether lines have groups of their own; None: on a GPU
    Collective over the world where there are lanes.
    """

    def __init__(
        self,
        mesh: ParallelMesh,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        ring: bool = False,
        lanes: bool | None = None,
    ):
        self.pp, self._shape, self._dtype, self._device, self._ring = mesh.pp, shape, dtype, device, ring
        self._coming: dict[Action, tuple[dist.Work, torch.Tensor]] = {}
        self._leaving: dict[tuple[str, int], deque[tuple[dist.Work, torch.Tensor]]] = {}
        self._lanes: dict[tuple[str, int], dist.ProcessGroup] = {}
        self._on_gpu = torch.device(device).type == "cuda"
        if mesh.pp.size > 1 and (self._on_gpu if lanes is None else lanes):
            self._open_lanes(mesh, "nccl" if self._on_gpu else None)

    @property
    def ahead(self) -> int:
        """How many computes before its message is due a receive may be posted.

        On a GPU none: there a receive is a kernel that waits for its message, and a compute that is launched behind it
        may wait for that kernel (CUDA loads a kernel at its first launch, and frees memory, when the device is idle).
        So nothing may be posted whose message needs a compute that this stage has yet to launch.
        """
        return 0 if self._on_gpu else AHEAD

    def expect(self, action: Action) -> None:
        """Post a receive."""
        assert action.op in RECEIVES and action not in self._coming, action
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._coming[action] = (self._post(action.op, tensor), tensor)

    def take(self, action: Action) -> torch.Tensor:
        """Return the tensor of a receive that was posted: waits until it is there."""
        work, tensor = self._coming.pop(action)
        with self.pp.timed():
            work.wait()
        return tensor

    def send(self, action: Action, tensor: torch.Tensor) -> None:
        """Hand a message over; it may still be on its way when this returns."""
        assert tuple(tensor.shape) == self._shape and tensor.dtype == self._dtype, (action, tensor.shape, tensor.dtype)
        leaving = self._leaving.setdefault(self._line(action.op), deque())
        tensor = tensor.contiguous()
        with self.pp.timed():
            while len(leaving) >= SENDS_UNDER_WAY:
                leaving.popleft()[0].wait()
            leaving.append((self._post(action.op, tensor), tensor))  # the tensor must live until it has left

    def finish(self) -> None:
        """Wait until everything sent has left."""
        assert not self._coming, f"never taken: {list(self._coming)}"
        with self.pp.timed():
            for leaving in self._leaving.values():
                while leaving:
                    leaving.popleft()[0].wait()

    def _line(self, op: str) -> tuple[str, int]:
        """Return (kind, the upper stage of the pair) of what this stage sends or receives."""
        kind = "activations" if op in (SEND_FORWARD, RECV_FORWARD) else "gradients"
        return kind, self.pp.rank if op in _DOWN else (self.pp.rank - 1) % self.pp.size

    def _post(self, op: str, tensor: torch.Tensor) -> dist.Work:
        kind, upper = self._line(op)
        peer = self.pp.ranks[(self.pp.rank + (1 if op in _DOWN else -1)) % self.pp.size]
        group = self._lanes.get((kind, self._color(upper)), self.pp.group)
        operation = dist.isend if op in SENDS else dist.irecv
        message = dist.P2POp(operation, tensor, peer, group, tag=_KINDS.index(kind))
        return dist.batch_isend_irecv([message])[-1]

    # ---- lanes

    def _color(self, upper: int) -> int:
        """Return the color of a pair: pairs that share a stage differ in it, so that a rank has one line in a lane."""
        closes_odd_ring = upper == self.pp.size - 1 and self.pp.size % 2 == 1
        return 2 if closes_odd_ring else upper % 2

    def _open_lanes(self, mesh: ParallelMesh, backend: str | None) -> None:
        pairs = mesh.pp.size if self._ring else mesh.pp.size - 1
        lanes = [(kind, color) for kind in _KINDS for color in sorted({self._color(upper) for upper in range(pairs)})]
        for ranks in layout(mesh.world_size, mesh.tp.size, mesh.pp.size)["pp"]:
            for lane in lanes:  # every rank creates all of them, in one order
                group = dist.new_group(list(ranks), backend=backend, pg_options=_lane_options(backend))
                if mesh.rank in ranks:
                    self._lanes[lane] = group
        # NCCL connects two ranks at their first message, and holds the host until the other end does so too: a receive
        # that is posted early would wait for a message that it holds up itself. So every line is used once here.
        word = torch.zeros(1, device=self._device)
        for group in self._lanes.values():
            dist.all_reduce(word, group=group)
        for upper in range(pairs):
            ops = {upper: (SEND_FORWARD, RECV_BACKWARD), (upper + 1) % mesh.pp.size: (RECV_FORWARD, SEND_BACKWARD)}
            for op in ops.get(mesh.pp.rank, ()):
                self._post(op, word).wait()
