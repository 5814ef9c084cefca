"""Learning-rate schedules: pure functions, so that resuming needs no state. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What some schedules take besides the share of steps that are done.

    least  the last rate, as a share of the peak
    decay  the share of the steps after warmup over which warmup_stable_decay falls
    power  of polynomial
    """

    least: float = 0.0
    decay: float = 0.2
    power: float = 1.0


def _above(least: float, share: float) -> float:
    return least + (1.0 - least) * share


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


SCHEDULES: Mapping[str, Callable[[float, Shape], float]] = {
    "linear": lambda done, shape: max(0.0, 1.0 - done),
    "cosine": lambda done, shape: _cosine(done),
    "constant": lambda done, shape: 1.0,
    "cosine_with_min_lr": lambda done, shape: _above(shape.least, _cosine(done)),
    "polynomial": lambda done, shape: _above(shape.least, max(0.0, 1.0 - done) ** shape.power),
    "warmup_stable_decay": lambda done, shape: _above(shape.least, min(1.0, max(0.0, 1.0 - done) / shape.decay)),
}
"""By the name that transformers has for it: the factor of the peak rate, from the share of the steps after warmup that
are done (0 to 1)."""

WITH_LEAST = ("cosine_with_min_lr", "polynomial", "warmup_stable_decay")
"""The schedules that read Shape.least."""


def learning_rate_factor(
    kind: str, step: int, total_steps: int, warmup_steps: int, shape: Shape | None = None
) -> float:
    """Return the factor of the peak rate at `step`, counted from 0.

    kind  one of SCHEDULES. Before it, the rate rises over warmup_steps, from 1 / (warmup_steps + 1), so that no step
          has rate 0.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return SCHEDULES[kind]((step - warmup_steps) / max(1, total_steps - warmup_steps), shape or Shape())
