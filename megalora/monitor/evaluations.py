"""The evaluations of a run, and what follows from them: the best one, and when to stop. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Evaluation(NamedTuple):
    step: int
    loss: float


class Evaluations:
    """All evaluations of a run in order of steps, those of earlier starts included.

    Whatever follows from them is a function of eval_metrics.jsonl alone: a resumed run decides as one that was never
    interrupted.
    """

    def __init__(self, made: Iterable[tuple[int, float]] = ()):
        self.best: Evaluation | None = None
        self.since_best = 0  # evaluations in a row without a lower loss than the best
        for step, loss in made:
            self.add(step, loss)

    def add(self, step: int, loss: float) -> bool:
        """Add an evaluation; return whether it is the best so far. A loss that is no finite number never is."""
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            self.best, self.since_best = Evaluation(step, loss), 0
            return True
        self.since_best += 1
        return False

    def exhausted(self, patience: int | None) -> bool:
        """Return whether the loss has not become lower for `patience` evaluations; None: never."""
        return patience is not None and self.since_best >= patience
