"""What a task decides: the loss of a microbatch on the last stage, and what an evaluation reports."""

from __future__ import annotations

from typing import Protocol

import torch

from megalora.models.inputs import Inputs
from megalora.parallel.embedding import VocabParallelHead


class Task(Protocol):
    """One objective. The loss of a step is the sum of its microbatches' over the labels of the whole global batch."""

    def loss(self, hidden: torch.Tensor, head: VocabParallelHead, inputs: Inputs) -> torch.Tensor:
        """Return the summed loss of a microbatch, a float32 (or float64) scalar, the same on every tp rank.

        hidden  [T, hidden_size], the final hidden states, normed: this rank's tokens under sequence parallelism
        """
        ...

    def report(self, loss: float) -> dict[str, float]:
        """Return the metrics of an evaluation from its mean loss over all labels, by name."""
        ...
