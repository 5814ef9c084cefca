"""RMSNorm with a frozen weight; whole on every tp rank."""

from __future__ import annotations

import torch
from torch import nn

from megalora.ops.rms_norm import rms_norm
from megalora.parallel.linear import Placement


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, place: Placement):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=place.dtype, device=place.device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)
