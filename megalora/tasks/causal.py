"""Causal language modelling: predict each labelled token from those before it in its document."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megalora.models.inputs import Inputs
from megalora.parallel.embedding import VocabParallelHead
from megalora.parallel.loss import next_token_loss

_LARGEST_EXPONENT = 700.0  # exp() of more is no float


class CausalLM:
    """The task of peft's `CAUSAL_LM`."""

    def loss(self, hidden: torch.Tensor, head: VocabParallelHead, inputs: Inputs) -> torch.Tensor:
        return next_token_loss(hidden, head, inputs)

    def sums(self, hidden: torch.Tensor, head: VocabParallelHead, inputs: Inputs) -> torch.Tensor:
        return self.loss(hidden, head, inputs).double().unsqueeze(0)

    def width(self, labels: Sequence[str]) -> int:
        return 1

    def report(self, sums: Sequence[float], count: float, labels: Sequence[str] = ()) -> dict[str, float]:
        """Return the loss and its perplexity, e to the loss."""
        loss = sums[0] / (count or 1)
        return {"loss": loss, "perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf}
