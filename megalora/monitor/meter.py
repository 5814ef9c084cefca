"""What a run counts between two logged steps: tokens, seconds and phases."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from megalora.monitor.timers import Timers


class Step(Protocol):
    """What is logged of a step (see `megalora.training.StepResult`)."""

    @property
    def loss(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...

    @property
    def learning_rate(self) -> float: ...


class Meter:
    """Tokens and seconds since the last logged step."""

    def __init__(self, flops_per_token: float, devices: int, steps_per_epoch: int):
        self._flops_per_token, self._devices, self._steps_per_epoch = flops_per_token, devices, steps_per_epoch
        self._restart()

    def _restart(self) -> None:
        self._tokens, self._earlier, self._start = 0, 0, time.perf_counter()
        self._phases: dict[str, float] = {}

    def state(self) -> dict[str, int]:
        """Return what `go_on` takes."""
        return {"tokens_since_log": self._earlier + self._tokens}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Count on from a run that stopped between two logged steps."""
        earlier = state.get("tokens_since_log", 0)
        self._earlier = earlier if isinstance(earlier, int) else 0

    @contextlib.contextmanager
    def apart(self, timers: Timers) -> Iterator[None]:
        """Leave the time and the phases of what runs inside out: it belongs to no step."""
        self._collect(timers)
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start
        timers.collect()

    def _collect(self, timers: Timers) -> None:
        for phase, seconds in timers.collect().items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def record(self, step: int, result: Step, timers: Timers) -> dict[str, Any]:
        """Return the record of a logged step; tokens counts all of them since the last record."""
        speed = self._tokens / max(1e-9, time.perf_counter() - self._start)
        record: dict[str, Any] = {
            "step": step,
            "epoch": step / self._steps_per_epoch,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": self._earlier + self._tokens,
            "tokens_per_second": speed,
            "tflops": speed * self._flops_per_token / self._devices / 1e12,
        }
        if timers.enabled:
            self._collect(timers)
            record["phases"] = self._phases
        self._restart()
        return record
