"""Norms with frozen weights; whole on every tp rank."""

from __future__ import annotations

import torch
from torch import nn

from megalora.models import spec
from megalora.ops.layer_norm import add_layer_norm, layer_norm
from megalora.ops.rms_norm import add_rms_norm, rms_norm
from megalora.parallel.placement import Placement


class Norm(nn.Module):
    """A norm of the last dimension: `weight`, and `bias` where the spec has one, frozen."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, norm: spec.Norm, place: Placement):
        super().__init__()
        self.eps = norm.eps
        for name, shape in norm.tensors():
            values = torch.empty(shape, dtype=place.dtype, device=place.device)
            self.register_parameter(name.rpartition(".")[2], nn.Parameter(values, requires_grad=False))

    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        """Return the norm of x [..., size]: [..., size + room], undefined in the room."""
        raise NotImplementedError

    def after(
        self, x: torch.Tensor, delta: torch.Tensor | None, room: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x + delta, its norm with room), for x, delta [T, size]; delta None: (x, its norm)."""
        raise NotImplementedError


class RMSNorm(Norm):
    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, room)

    def after(self, x, delta, room=0):
        if delta is None:
            return x, self(x, room)
        return add_rms_norm(x, delta, self.weight, self.eps, room)


class LayerNorm(Norm):
    def __init__(self, norm: spec.Norm, place: Placement):
        super().__init__(norm, place)
        if not norm.bias:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, room)

    def after(self, x, delta, room=0):
        if delta is None:
            return x, self(x, room)
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps, room)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
