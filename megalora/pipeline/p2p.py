"""Activations and gradients between neighbouring stages, of one static shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megalora.parallel.mesh import Axis
from megalora.pipeline.actions import RECV_BACKWARD, RECV_FORWARD, SEND_FORWARD, Action


class Neighbours:
    """Sends and receives of one stage. Sends are not waited for until the step ends; receives are.

    shape, dtype, device  of every message: [T, hidden_size] in the compute dtype
    """

    def __init__(self, pp: Axis, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str):
        self._pp, self._shape, self._dtype, self._device = pp, shape, dtype, device
        self._sending: list[tuple[dist.Work, torch.Tensor]] = []  # a tensor must live until it has left

    def exchange(self, actions: Sequence[Action], outgoing: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Posts the communication actions together and waits for what comes in.

        outgoing  the tensor of each send; None for a receive. Returns the tensor of each receive; None for a send.
        """
        incoming: list[torch.Tensor | None] = []
        operations = []
        for action, tensor in zip(actions, outgoing, strict=True):
            receives = action.op in (RECV_FORWARD, RECV_BACKWARD)
            downstream = action.op in (SEND_FORWARD, RECV_BACKWARD)  # the other end is the next stage
            peer = self._pp.ranks[self._pp.rank + (1 if downstream else -1)]
            if receives:
                tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            incoming.append(tensor if receives else None)
            assert tensor is not None and tuple(tensor.shape) == self._shape, (action, self._shape)
            operation = dist.irecv if receives else dist.isend
            operations.append(dist.P2POp(operation, tensor.contiguous(), peer, self._pp.group))
        with self._pp.timed():
            works = dist.batch_isend_irecv(operations)
            if len(works) < len(operations):  # NCCL gives one work for the batch: it ends when all of it has
                for work in works:
                    work.wait()
            else:
                for work, operation, received in zip(works, operations, incoming, strict=True):
                    if received is not None:
                        work.wait()
                    else:
                        self._sending.append((work, operation.tensor))
        self._sending = [(work, tensor) for work, tensor in self._sending if not work.is_completed()]
        return incoming

    def finish(self) -> None:
        """Waits until everything sent has left."""
        with self._pp.timed():
            for work, _ in self._sending:
                work.wait()
        self._sending.clear()
