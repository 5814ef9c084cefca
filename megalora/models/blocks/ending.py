"""What is done to a mixer's result before it is added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalora.models.blocks.norm import Norm
from megalora.models.inputs import Inputs
from megalora.ops.dropout import Dropout, drop
from megalora.ops.fused_norm import Addend


@dataclass(frozen=True)
class BaseDropout:
    """Dropout of the base, of what a mixer adds: p and the site of its masks."""

    p: float
    site: int

    def draw(self, inputs: Inputs) -> Dropout | None:
        return inputs.tokens.draw(self.p, self.site)

    def local(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Drop features of x [T, O], this rank's tokens under sequence parallelism."""
        return drop(x, inputs.tokens.local, self.draw(inputs))

    def whole(self, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Drop features of x [F, O], all tokens; [T, O] is the same where tp is 1."""
        return drop(x, inputs.tokens.index, self.draw(inputs))


@dataclass(frozen=True)
class Ending:
    """dropout(scale * norm(result)), each where there is one."""

    norm: Norm | None
    scale: float
    dropout: BaseDropout

    def __call__(self, result: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return what is added [T, hidden_size] of a mixer's result [T, hidden_size]."""
        added = result if self.norm is None else self.norm(result)
        return self.dropout.local(added if self.scale == 1.0 else added * self.scale, inputs)

    def addend(self, inputs: Inputs) -> Addend:
        """Return the same for the kernel that adds it."""
        draw = self.dropout.draw(inputs)
        index = None if draw is None else inputs.tokens.local
        return Addend(None if self.norm is None else self.norm.weights, self.scale, index, draw)
