"""Learning-rate schedules: pure functions, so that resuming needs no state. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda done: max(0.0, 1.0 - done),
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))),
    "constant": lambda done: 1.0,
}
"""By name: the factor of the peak rate, from the share of the steps after warmup that are done (0 to 1)."""


def learning_rate_factor(kind: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the factor of the peak rate at `step`, counted from 0.

    kind  one of SCHEDULES. Before it, the rate rises over warmup_steps, from 1 / (warmup_steps + 1), so that no step
          has rate 0.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return SCHEDULES[kind]((step - warmup_steps) / max(1, total_steps - warmup_steps))
