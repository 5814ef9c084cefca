"""Executes the action list of a schedule over the microbatches of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import nn

from megalora.parallel.mesh import Axis, Clock
from megalora.pipeline.actions import (
    BACKWARD,
    COMMUNICATION,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_FORWARD,
    Action,
)
from megalora.pipeline.p2p import Neighbours
from megalora.pipeline.schedule import Schedule, forward_only


class PipelineRunner:
    """Runs forward and backward of all microbatches of a step on this stage.

    stage     the nn.Module of this stage: stage(hidden or None, inputs) -> hidden, or on the last stage a scalar loss
    pp        the pipeline axis
    schedule  one of megalora.pipeline.schedule.SCHEDULES
    floor     the first stage that has a trainable parameter: stages before it run no backward and get no gradient
    shape, dtype, device  of the hidden states between stages
    clock     times the phases forward, backward and communication
    """

    def __init__(
        self,
        stage: nn.Module,
        pp: Axis,
        schedule: Schedule,
        floor: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        clock: Clock | None = None,
    ):
        self._stage, self._pp, self._schedule, self._floor = stage, pp, schedule, floor
        self._device = device
        self._neighbours = Neighbours(pp, shape, dtype, device)
        self._clock: Clock = clock or (lambda phase: contextlib.nullcontext())

    def train(self, microbatches: int, inputs: Callable[[int], object], scale: float | torch.Tensor) -> torch.Tensor:
        """Forward and backward of every microbatch; gradients accumulate in the parameters.

        inputs(m)  what the stage reads of microbatch m
        scale      what each microbatch's summed loss is multiplied by before its backward
        Returns the sum of the unscaled losses as a float64 scalar; 0 on stages that have no loss.
        """
        actions = self._schedule.programme(self._pp.size, microbatches, self._floor)[self._pp.rank]
        return self._run(actions, inputs, scale)

    @torch.no_grad()
    def evaluate(self, microbatches: int, inputs: Callable[[int], object]) -> torch.Tensor:
        """The sum of the losses of every microbatch as a float64 scalar; 0 on stages that have no loss."""
        return self._run(forward_only(self._pp.size, microbatches)[self._pp.rank], inputs, 1.0)

    def _run(
        self, actions: Sequence[Action], inputs: Callable[[int], object], scale: float | torch.Tensor
    ) -> torch.Tensor:
        received: dict[tuple[str, int], torch.Tensor] = {}
        entered: dict[int, torch.Tensor] = {}  # what came in, whose gradient goes back
        left: dict[int, torch.Tensor] = {}  # what went out, or the loss
        gradients: dict[int, torch.Tensor] = {}
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        wants_input_grad = self._pp.rank > self._floor
        has_backward = torch.is_grad_enabled() and self._pp.rank >= self._floor
        for together in _communication_together(actions):
            action = together[0]
            m = action.microbatch
            if action.op in COMMUNICATION:
                outgoing = [
                    left[a.microbatch].detach() if a.op == SEND_FORWARD else gradients.pop(a.microbatch, None)
                    for a in together
                ]
                for a, tensor in zip(together, self._neighbours.exchange(together, outgoing), strict=True):
                    if tensor is not None:
                        received[a.op, a.microbatch] = tensor
                    elif a.op == SEND_FORWARD and not has_backward:
                        del left[a.microbatch]
            elif action.op == FORWARD:
                hidden = None
                if not self._pp.is_first:
                    hidden = received.pop((RECV_FORWARD, m))
                    hidden.requires_grad_(wants_input_grad and torch.is_grad_enabled())
                    if hidden.requires_grad:
                        entered[m] = hidden
                with self._clock("forward"):
                    left[m] = self._stage(hidden, inputs(m))
                if self._pp.is_last:
                    total += left[m].detach()
                    if not has_backward:
                        del left[m]
            elif action.op == BACKWARD:
                out = left.pop(m)
                with self._clock("backward"):
                    if self._pp.is_last:
                        (out * scale).backward()
                    else:
                        out.backward(received.pop((RECV_BACKWARD, m)))
                if wants_input_grad:
                    gradients[m] = entered.pop(m).grad
        self._neighbours.finish()
        return total


def _communication_together(actions: Iterable[Action]) -> Iterator[Sequence[Action]]:
    """The actions one by one, but neighbouring communication actions as one group."""
    for communicates, group in groupby(actions, key=lambda action: action.op in COMMUNICATION):
        if communicates:
            yield list(group)
        else:
            yield from ([action] for action in group)
