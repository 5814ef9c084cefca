"""RMSNorm with a frozen weight; whole on every tp rank."""

from __future__ import annotations

import torch
from torch import nn

from megalora.ops.rms_norm import add_rms_norm, rms_norm
from megalora.parallel.linear import Placement


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, place: Placement):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=place.dtype, device=place.device), requires_grad=False)

    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        """x [..., size] -> [..., size + room]; undefined in the room."""
        return rms_norm(x, self.weight, self.eps, room)

    def after(
        self, x: torch.Tensor, delta: torch.Tensor | None, room: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + delta, its norm with room), for x, delta [T, size]; delta None: (x, its norm)."""
        if delta is None:
            return x, self(x, room)
        return add_rms_norm(x, delta, self.weight, self.eps, room)
