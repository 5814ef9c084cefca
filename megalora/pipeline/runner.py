"""Executes the action list of a schedule over the microbatches of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megalora.parallel.mesh import Clock
from megalora.pipeline.actions import (
    BACKWARD,
    FORWARD,
    RECEIVES,
    RECOMPUTE,
    SENDS,
    Action,
    input_of,
    output_of,
    part_of,
)
from megalora.pipeline.p2p import Neighbours
from megalora.pipeline.schedule import Schedule, forward_only


class ChunkedStage(Protocol):
    """What the runner computes with."""

    def __call__(self, hidden: torch.Tensor | None, inputs: object, chunk: int = 0) -> torch.Tensor:
        """Map hidden [T, hidden_size] (None for the model's first chunk) to hidden; of its last chunk a scalar loss."""
        ...


@dataclass
class _InFlight:
    """A microbatch of a chunk between its forward and its backward.

    entered  what came in, whose gradient goes back; None where the chunk begins the model
    inputs   to compute again from, else None
    out      what backward starts from; None until it is computed again
    """

    entered: torch.Tensor | None
    inputs: object = None
    out: torch.Tensor | None = None


@dataclass
class _Step:
    """The microbatches of a step on their way."""

    inputs: Callable[[int], object]
    scale: float | torch.Tensor
    floor: int
    in_flight: dict[tuple[int, int], _InFlight] = field(default_factory=dict)  # by (microbatch, chunk)
    outgoing: dict[Action, torch.Tensor] = field(default_factory=dict)  # by its send


class PipelineRunner:
    """Runs forward and backward of all microbatches of a step on this stage.

    stage       computes a chunk
    neighbours  its lines to the stages beside it
    schedule    one of megalora.pipeline.schedule.SCHEDULES
    floor       the first part of the model (see actions.part_of) that has a trainable parameter: those before it keep
                nothing, run no backward and get no gradient
    chunks      of the stage
    clock       times the phases forward, backward and communication
    watch       watch(action) is a context in which each compute runs (--profile)
    """

    def __init__(
        self,
        stage: ChunkedStage,
        neighbours: Neighbours,
        schedule: Schedule,
        floor: int,
        *,
        device: torch.device | str,
        chunks: int = 1,
        clock: Clock | None = None,
        watch: Callable[[Action], contextlib.AbstractContextManager] | None = None,
    ):
        self._stage, self._neighbours, self._schedule, self._floor = stage, neighbours, schedule, floor
        self._pp, self._chunks, self._device = neighbours.pp, chunks, device
        self._clock: Clock = clock or (lambda phase: contextlib.nullcontext())
        self._watch = watch or (lambda action: contextlib.nullcontext())

    def train(self, microbatches: int, inputs: Callable[[int], object], scale: float | torch.Tensor) -> torch.Tensor:
        """Run forward and backward of every microbatch; gradients accumulate in the parameters.

        inputs(m)  what the stage reads of microbatch m
        scale      what each microbatch's summed loss is multiplied by before its backward
        Returns the sum of the unscaled losses as a float64 scalar; 0 on stages that have no loss.
        """
        programme = self._schedule.programme(self._pp.size, microbatches, self._floor, self._chunks)
        return self._run(programme[self._pp.rank], _Step(inputs, scale, self._floor))

    @torch.no_grad()
    def evaluate(
        self, microbatches: int, inputs: Callable[[int], object], shape: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """Return the sum over microbatches of what the last stage gives: its loss, a float64 scalar; 0 elsewhere.

        shape  of what it gives, where that is no scalar
        """
        programme = forward_only(self._pp.size, microbatches, self._chunks)
        return self._run(programme[self._pp.rank], _Step(inputs, 1.0, self._pp.size * self._chunks), shape)

    def _run(self, actions: Sequence[Action], step: _Step, shape: tuple[int, ...] = ()) -> torch.Tensor:
        compute: Mapping[str, Callable[[Action, torch.Tensor | None, _Step], torch.Tensor | None]]
        compute = {FORWARD: self._forward, RECOMPUTE: self._recompute, BACKWARD: self._backward}
        total = torch.zeros(shape, dtype=torch.float64, device=self._device)
        for action in receives_early(actions, self._neighbours.ahead):
            if action.op in RECEIVES:
                self._neighbours.expect(action)
            elif action.op in SENDS:
                self._neighbours.send(action, step.outgoing.pop(action))
            else:
                wanted = input_of(self._pp.rank, self._pp.size, self._chunks, action)
                received = None if wanted is None else self._neighbours.take(wanted)
                with self._watch(action):
                    loss = compute[action.op](action, received, step)
                if loss is not None:
                    total += loss
        self._neighbours.finish()
        assert not step.in_flight and not step.outgoing
        return total

    def _forward(self, action: Action, hidden: torch.Tensor | None, step: _Step) -> torch.Tensor | None:
        """Return the loss, on the model's last part."""
        part = part_of(self._pp.rank, self._pp.size, action.chunk)
        trained = part >= step.floor
        recomputes = trained and self._schedule.recomputes(self._pp.rank, self._pp.size)
        inputs = step.inputs(action.microbatch)
        if hidden is not None:
            hidden.requires_grad_(part > step.floor)
        with self._clock("forward"), torch.set_grad_enabled(trained and not recomputes):
            out = self._stage(hidden, inputs, action.chunk)
        if trained:
            kept = _InFlight(hidden, inputs) if recomputes else _InFlight(hidden, out=out)
            step.in_flight[action.microbatch, action.chunk] = kept
        return self._give(action, out.detach(), step)

    def _recompute(self, action: Action, received: torch.Tensor | None, step: _Step) -> None:
        kept = step.in_flight[action.microbatch, action.chunk]
        with self._clock("backward"):
            kept.out = self._stage(kept.entered, kept.inputs, action.chunk)

    def _backward(self, action: Action, gradient: torch.Tensor | None, step: _Step) -> None:
        kept = step.in_flight.pop((action.microbatch, action.chunk))
        with self._clock("backward"):
            if gradient is None:
                (kept.out * step.scale).backward()
            else:
                kept.out.backward(gradient)
        self._give(action, None if kept.entered is None else kept.entered.grad, step)

    def _give(self, action: Action, result: torch.Tensor | None, step: _Step) -> torch.Tensor | None:
        """Lay the result aside for its send; return the result itself where it is for no other stage."""
        send = output_of(self._pp.rank, self._pp.size, self._chunks, step.floor, action)
        if send is None:
            return result
        step.outgoing[send] = result
        return None


def receives_early(actions: Sequence[Action], ahead: int) -> list[Action]:
    """Put each receive `ahead` computes earlier: it is posted before its message is due.

    A list has a receive where its message would be made if all computes took the same time. Where receives stop no
    stage any earlier place is sound; messages of one kind stay in order. What is sent goes first.
    """
    computes: list[Action] = []
    sends: list[list[Action]] = [[]]  # by the number of computes before them, and so are the receives
    receives: list[list[Action]] = [[]]
    for action in actions:
        if action.op in RECEIVES:
            receives[max(0, len(computes) - ahead)].append(action)
        elif action.op in SENDS:
            sends[-1].append(action)
        else:
            computes.append(action)
            sends.append([])
            receives.append([])
    found = []
    for i, (sent, received) in enumerate(zip(sends, receives, strict=True)):
        found += [*sent, *received, *computes[i : i + 1]]
    return found
