"""What a task decides: the loss of a microbatch on the last stage, and what an evaluation reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from megalora.models.inputs import Inputs


class Task(Protocol):
    """One objective. The loss of a step is the sum of its microbatches' over the labels of the whole global batch.

    head    of the last stage: a VocabParallelHead of a language model, the ClassScores of a classifier
    hidden  [T, hidden_size], the final hidden states, normed: this rank's tokens under sequence parallelism
    labels  names of the classes, where the task has such
    """

    def loss(self, hidden: torch.Tensor, head: Any, inputs: Inputs) -> torch.Tensor:
        """Return the summed loss of a microbatch, a float32 (or float64) scalar, the same on every tp rank."""
        ...

    def sums(self, hidden: torch.Tensor, head: Any, inputs: Inputs) -> torch.Tensor:
        """Return what `report` reads, [width] float64: the summed loss, and what else adds up over microbatches."""
        ...

    def width(self, labels: Sequence[str]) -> int:
        """Return how many numbers `sums` returns."""
        ...

    def report(self, sums: Sequence[float], count: float, labels: Sequence[str] = ()) -> dict[str, float]:
        """Return the metrics of an evaluation by name, "loss" first.

        sums   those of `sums`, added up over the evaluation set; count: its labelled tokens
        """
        ...
