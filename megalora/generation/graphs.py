"""Decoding by CUDA graphs: a step of one token each is recorded once for each number of sequences and then replayed,
so that no kernel waits for Python."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megalora.batch import to_device
from megalora.models.recorder import Graph, Recorder

WARM_UP = 2  # steps before a recording: libraries set themselves up in the first

Decode = Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Recording:
    """where: token ids, slots, places and adapters [4, n]; hidden, out: of the stage before, and what goes on."""

    graph: Graph
    where: torch.Tensor
    hidden: torch.Tensor | None
    out: torch.Tensor


class DecodeGraphs:
    """A decoding step that is recorded for 1, 2, 4, 8, ... sequences; what a step has less, it feeds to `spare`.

    decode  (hidden [n, hidden_size] or None, ids, slots, places, adapters [n]) -> [n, hidden_size], of fixed shapes
            throughout
    spare   a slot of the cache that no sequence uses
    like    a tensor of the dtype and on the device of `hidden`, [hidden_size]; None on the first stage
    """

    def __init__(self, decode: Decode, spare: int, device: torch.device, like: torch.Tensor | None):
        self._decode, self._spare, self._device, self._like = decode, spare, device, like
        self._recordings: dict[int, _Recording] = {}

    def __call__(
        self,
        hidden: torch.Tensor | None,
        token_ids: Sequence[int] | torch.Tensor,
        slots: Sequence[int],
        places: Sequence[int],
        adapters: Sequence[int],
    ) -> torch.Tensor:
        """Return what `decode` gives. It is overwritten by the next step.

        token_ids  [n], on the host or on the device
        """
        count = len(slots)
        width = 1 << (count - 1).bit_length()
        idle = width - count
        recording = self._recordings.get(width) or self._record(width)
        there = token_ids if isinstance(token_ids, torch.Tensor) else None
        fillers = (0, self._spare, 0, 0)
        rows = zip(([0] * count if there is not None else token_ids, slots, places, adapters), fillers, strict=True)
        where = torch.tensor([[*row, *[filler] * idle] for row, filler in rows])
        recording.where.copy_(to_device(where, self._device))
        if there is not None:
            recording.where[0, :count] = there
        if hidden is not None:
            recording.hidden[:count] = hidden
        recording.graph.replay()
        return recording.out[:count]

    def forget(self) -> None:
        """Give up what is recorded: the next steps record anew."""
        if self._recordings:
            graphs = [recording.graph for recording in self._recordings.values()]
            self._recordings.clear()
            self._recorder.forget(graphs)

    def _record(self, width: int) -> _Recording:
        where = torch.zeros(4, width, dtype=torch.int64, device=self._device)
        where[1] = self._spare
        hidden = None if self._like is None else self._like.new_zeros(width, *self._like.shape)
        # All recordings share one pool of memory: they never run at the same time.
        out, graph = self._recorder.record(lambda: self._decode(hidden, *where), warm_up=WARM_UP)
        self._recordings[width] = _Recording(graph, where, hidden, out)
        return self._recordings[width]

    @functools.cached_property
    def _recorder(self) -> Recorder:
        return Recorder(self._device, error_mode="global")
