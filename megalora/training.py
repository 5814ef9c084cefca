"""One optimizer step, and one pass over an evaluation set, on any mesh."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from megalora.batch import Batch
from megalora.errors import UserError
from megalora.models.inputs import training_inputs
from megalora.models.stage import Stage
from megalora.optimizer import AdapterOptimizer, LossScale
from megalora.parallel.collectives import all_reduce
from megalora.parallel.grads import FlatGradients
from megalora.parallel.mesh import Clock, ParallelMesh
from megalora.pipeline.runner import PipelineRunner

MOST_BAD_STEPS = 3  # in a row, before the run stops


@contextlib.contextmanager
def steady_heap() -> Iterator[None]:
    """Make Python's collector pass over what is there at the start: a full collection over the libraries takes 0.1 s.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class StepData(Protocol):
    """This rank's microbatches of a step, with counts over the whole global batch."""

    @property
    def microbatches(self) -> list[Batch]: ...

    @property
    def label_count(self) -> float: ...

    @property
    def token_count(self) -> int: ...


@dataclass(frozen=True)
class StepResult:
    """What a step tells: the same on every rank.

    loss       mean over the labelled tokens of the global batch, by their weights where rows have some
    grad_norm  global, before clipping
    skipped    why no update was made, or None
    alarm      whether any rank called `step` with an alarm: they all hear of it after the same step
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    skipped: str | None = None
    alarm: bool = False


class Trainer:
    """Steps of a run on this rank.

    learning_rate  a function of the step, counted from 0
    seed           of the dropout masks
    """

    def __init__(
        self,
        stage: Stage,
        mesh: ParallelMesh,
        runner: PipelineRunner,
        gradients: FlatGradients,
        optimizer: AdapterOptimizer,
        *,
        learning_rate: Callable[[int], float],
        max_grad_norm: float,
        seed: int,
        loss_scale: LossScale,
        clock: Clock,
    ):
        self._stage, self._mesh, self._runner, self._gradients = stage, mesh, runner, gradients
        self._learning_rate, self._max_grad_norm, self._seed, self._clock = (
            learning_rate,
            max_grad_norm,
            seed,
            clock,
        )
        self.optimizer, self.loss_scale = optimizer, loss_scale
        self.bad_steps = 0

    def step(self, number: int, data: StepData, alarm: bool = False) -> StepResult:
        """Run forward and backward of the step's microbatches, one reduction and one update.

        alarm  this rank has something that all ranks must see to after this step; it rides on the loss's reduction
        Raises UserError on every rank after MOST_BAD_STEPS steps in a row whose loss or gradient is not finite.
        """
        self._stage.refresh_adapters()
        self._gradients.zero()
        inputs = self._inputs(data, self._seed, number)
        scale = self.loss_scale.value / (data.label_count or 1)
        loss_sum = self._runner.train(len(data.microbatches), inputs, scale)
        self._gradients.reduce()
        sums = self._over_world(loss_sum, self._gradients.square_sum(), alarm)
        rate = self._learning_rate(number)
        with self._clock("optimizer"):
            self._update(sums, rate)
        loss_sum, square, alarms = sums.tolist()  # a GPU has its update before the host waits for it here
        loss = loss_sum / (data.label_count or 1)
        norm = math.sqrt(square) / self.loss_scale.value if math.isfinite(square) else square
        return StepResult(loss, norm, rate, data.token_count, self._account(loss, norm, number), alarms > 0)

    def close(self) -> None:
        """Release graphs and connections. Call before destroying the process group; no step can follow."""
        self._stage.close()

    def state(self) -> dict[str, Any]:
        """Return the plain values that `load_state` takes, the same on every rank."""
        return {
            "optimizer_steps": self.optimizer.steps,
            **self.loss_scale.state(),
            "bad_steps": self.bad_steps,
        }

    def load_state(self, state: Mapping[str, Any], moments: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Go on from `state` and the optimizer's moments, by name of this rank's parameters."""
        self.optimizer.load_state(moments, int(state["optimizer_steps"]))
        self.loss_scale.load_state(state)
        self.bad_steps = int(state["bad_steps"])

    def _update(self, sums: torch.Tensor, rate: float) -> None:
        """Clip and update on the device without a host sync; skip the update if loss or norm is not finite."""
        loss_sum, square, _ = sums.unbind()
        norm = square.sqrt() / self.loss_scale.value
        factor: float | torch.Tensor = 1.0 / self.loss_scale.value
        if self._max_grad_norm > 0:
            factor = factor * (self._max_grad_norm / norm).clamp(max=1.0)
        if self._max_grad_norm > 0 or factor != 1.0:
            self._gradients.buffer.mul_(factor)
        self.optimizer.step(rate, skip=~(loss_sum.isfinite() & norm.isfinite()))

    def _account(self, loss: float, norm: float, number: int) -> str | None:
        """Return what became of the update: None where it was made, else why it was not."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        searching = self.loss_scale.update(overflowed=not finite)
        if finite:
            self.bad_steps = 0
            return None
        self.optimizer.skipped()
        what = f"loss {loss}, gradient norm {norm}"
        if searching and math.isfinite(loss):
            return f"{what}: loss scale halved to {self.loss_scale.value:g}"
        self.bad_steps += 1
        if self.bad_steps == MOST_BAD_STEPS:
            raise UserError(
                f"step {number + 1}: {what}, the {MOST_BAD_STEPS}rd step in a row that is not finite",
                "lower --learning_rate, look at the rows of these steps, or use --dtype bfloat16",
            )
        return what

    def evaluate(self, steps: Iterable[StepData]) -> float:
        """Return the mean loss over the labelled tokens of `steps`, without dropout."""
        sums, labels = self.measure(steps, 1)
        return sums[0] / (labels or 1)

    def measure(self, steps: Iterable[StepData], width: int) -> tuple[list[float], float]:
        """Return what the task's `sums` add up to over `steps`, [width], and their label count; without dropout.

        width 1 is the loss alone.
        """
        self._stage.refresh_adapters()
        totals: list[float] = [0.0] * width
        labels: float = 0
        for data in steps:
            inputs = self._inputs(data, None, 0, measures=width > 1)
            sums = self._runner.evaluate(len(data.microbatches), inputs, () if width == 1 else (width,))
            if width == 1:
                found = self._over_world(sums, torch.zeros_like(sums)).tolist()[:1]
            else:
                found = all_reduce(sums / self._mesh.tp.size, self._mesh.world).tolist()
            totals = [total + one for total, one in zip(totals, found, strict=True)]
            labels += data.label_count
        return totals, labels

    def _inputs(self, data: StepData, seed: int | None, step: int, measures: bool = False) -> Callable[[int], object]:
        def inputs(m: int) -> object:
            with self._clock("data"):
                batch = data.microbatches[m]
                found = training_inputs(batch, self._stage.config, self._stage.place, seed=seed, step=step)
                return replace(found, measures=True) if measures else found

        return inputs

    def _over_world(self, loss_sum: torch.Tensor, square: torch.Tensor, alarm: bool = False) -> torch.Tensor:
        """Return (loss sum of the global batch, squared gradient norm, number of alarms), in one reduction over all
        ranks.
        """
        # Every tp rank of the last stage has the loss of its dp rank; other stages have 0.
        sums = torch.stack([loss_sum / self._mesh.tp.size, square, torch.full_like(square, float(alarm))])
        return all_reduce(sums, self._mesh.world)
