"""Pipelines whose layers only sleep: what the schedule, the messages and the runner make of known times."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalora.parallel.mesh import build_mesh
from megalora.pipeline.actions import BACKWARD, COMPUTE, Action, part_of
from megalora.pipeline.p2p import Neighbours
from megalora.pipeline.partition import partition
from megalora.pipeline.runner import PipelineRunner
from megalora.pipeline.schedule import SCHEDULES
from megalora.pipeline.simulate import Timeline, simulate

SHAPE = (64, 64)


@dataclass(frozen=True)
class Pipeline:
    """A step to time.

    layer    seconds of the forward of a layer, and as many of its backward
    lowest   the lowest adapted layer
    floor    whether the layers before it are left out of the backward
    latency  seconds added to every message
    """

    schedule: str = "1f1b"
    microbatches: int = 8
    stages: int = 4
    chunks: int = 1
    layers: int = 16
    layer: float = 0.01
    partition_method: str = "uniform"
    lowest: int = 0
    floor: bool = True
    latency: float = 0.0

    def parts(self) -> list[range]:
        costs = [self.layer * (1 + self._backward(layer)) for layer in range(self.layers)]
        return partition(self.partition_method, costs, self.stages * self.chunks)

    def first_trained(self) -> int:
        return next(i for i, part in enumerate(self.parts()) if self._backward(part.stop - 1))

    def seconds(self, stage: int, action: Action) -> float:
        if action.op not in COMPUTE:
            return 0.0
        layers = self.parts()[part_of(stage, self.stages, action.chunk)]
        return self.layer * (sum(map(self._backward, layers)) if action.op == BACKWARD else len(layers))

    def _backward(self, layer: int) -> bool:
        return not self.floor or layer >= self.lowest

    def predicted(self) -> Timeline:
        programme = SCHEDULES[self.schedule].programme(
            self.stages, self.microbatches, self.first_trained(), self.chunks
        )
        return simulate(programme, self.seconds, self.latency)


def sleep(seconds: float) -> None:
    """As long as it says: time.sleep comes back a tenth of a millisecond late."""
    end = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - 1e-4))
    while time.perf_counter() < end:
        pass


class _Slept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, anchor, forward: float, backward: float):
        ctx.backward_seconds = backward
        sleep(forward)
        return hidden + 0.0

    @staticmethod
    def backward(ctx, gradient):
        sleep(ctx.backward_seconds)
        return gradient, None, None, None


class _Stage:
    """anchor stands for an adapter: something that wants a gradient."""

    def __init__(self, pipeline: Pipeline, stage: int):
        self._pipeline, self._stage = pipeline, stage
        self._times = [
            [pipeline.seconds(stage, Action(op, 0, chunk)) for op in ("forward", BACKWARD)]
            for chunk in range(pipeline.chunks)
        ]
        self._anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def __call__(self, hidden: torch.Tensor | None, inputs: None, chunk: int = 0) -> torch.Tensor:
        hidden = torch.zeros(SHAPE, dtype=torch.float64) if hidden is None else hidden
        out = _Slept.apply(hidden, self._anchor, *self._times[chunk])
        last = part_of(self._stage, self._pipeline.stages, chunk) == self._pipeline.stages * self._pipeline.chunks - 1
        return out.sum() if last else out


class LateNeighbours(Neighbours):
    """Neighbours whose messages are there `latency` seconds after they were sent, whatever is done meanwhile."""

    latency = 0.0

    def send(self, action: Action, tensor: torch.Tensor) -> None:
        tensor = tensor.clone()
        tensor[0, 0] = time.perf_counter()  # one clock for all processes of a machine
        super().send(action, tensor)

    def take(self, action: Action) -> torch.Tensor:
        tensor = super().take(action)
        sleep(max(0.0, tensor[0, 0].item() + self.latency - time.perf_counter()))
        return tensor


def measure(rank: int, world_size: int, pipelines: list[Pipeline], repeats: int = 1) -> list[float]:
    """The makespan of each pipeline, from the common start to the last stage's end: the best of `repeats`, since what
    else the machine does can only add to it."""
    mesh = build_mesh(rank, world_size, 1, world_size)
    found = []
    for pipeline in pipelines:
        kind = LateNeighbours if pipeline.latency else Neighbours
        neighbours = kind(mesh, SHAPE, torch.float64, "cpu", ring=pipeline.chunks > 1)
        neighbours.latency = pipeline.latency
        runner = PipelineRunner(
            _Stage(pipeline, rank), neighbours, SCHEDULES[pipeline.schedule], pipeline.first_trained(),
            device="cpu", chunks=pipeline.chunks,
        )  # fmt: skip
        if not found:
            runner.train(1, lambda m: None, 1.0)  # the first use of anything takes longer
        found.append(min(_makespan(runner, pipeline.microbatches) for _ in range(repeats)))
    return found


def _makespan(runner: PipelineRunner, microbatches: int) -> float:
    span = torch.zeros(2, dtype=torch.float64)
    dist.barrier()
    start = time.perf_counter()
    runner.train(microbatches, lambda m: None, 1.0)
    span[0], span[1] = -start, time.perf_counter()
    dist.all_reduce(span, dist.ReduceOp.MAX)
    return float(span[0] + span[1])
