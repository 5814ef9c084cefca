"""What stands between up and down of experts, and the weights of pairs in it: SwiGLU in one Triton kernel on a GPU,
torch elsewhere.

Legend: M rows (pairs of token and expert), F tokens, k choices of each, I inner features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megalora.ops.activations import ACTIVATIONS
from megalora.ops.routing import Routes, fuses
from megalora.ops.swiglu import swiglu, swiglu_backward

_BLOCK = 1024


class GateGrads(NamedTuple):
    """Gradients of gate_up [M, 2 I] and of each row's weight [M]; what down read, [M, I], where it was asked for."""

    gate_up: torch.Tensor
    weights: torch.Tensor
    result: torch.Tensor | None


class Gate(Protocol):
    """weighs_result: the weight of a pair is a factor of what down reads; else it is within its gate.

    parts  what one of the features that down reads is made of: gate and up, or up alone
    """

    @property
    def weighs_result(self) -> bool: ...

    @property
    def parts(self) -> int: ...

    def forward(self, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, room: int) -> torch.Tensor:
        """Return what down reads with room behind it, [M, I + room], undefined in the room.

        gate_up [M, 2 I], gate before up (Clamped: in turn); weights [F, k] in at least float32. Not for autograd.
        """
        ...

    def backward(
        self, dh: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, again: bool
    ) -> GateGrads:
        """Return the gradients from dh [M, I], overwritten. again: with what forward returned, without room."""
        ...


@dataclass(frozen=True)
class Gated:
    """w act(gate) up. act: one of megalora.ops.swiglu.ACTS."""

    act: str = "silu"

    weighs_result, parts = True, 2

    def forward(self, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, room: int) -> torch.Tensor:
        if self.act != "silu" or not fuses(gate_up):
            X = swiglu(gate_up, room, self.act)
            X[:, : gate_up.shape[1] // 2].mul_(_of_rows(weights, routes))
            return X
        from megalora.ops.routing_kernels import gate_kernel

        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        X = gate_up.new_empty(rows, size + room)
        grid = (rows, -(-size // _BLOCK))
        gate_kernel[grid](gate_up, weights.contiguous(), routes.pair, routes.count, X, size, X.stride(0), BLOCK=_BLOCK)
        return X

    def backward(
        self, dh: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, again: bool
    ) -> GateGrads:
        if self.act != "silu" or not fuses(gate_up):
            dweights = (dh * swiglu(gate_up, act=self.act)).sum(1, dtype=weights.dtype)
            grad = swiglu_backward(dh.mul_(_of_rows(weights, routes)), gate_up, None, self.act)[0]
            return GateGrads(grad, dweights, self.forward(gate_up, weights, routes, 0) if again else None)
        from megalora.ops.routing_kernels import gate_backward_kernel

        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        grad, dweights = torch.empty_like(gate_up), weights.new_empty(rows)
        gate_backward_kernel[(rows,)](
            dh, gate_up, weights.contiguous(), routes.pair, routes.count, grad, dweights, size, dh.stride(0),
            AGAIN=again, BLOCK=_BLOCK,
        )  # fmt: skip
        return GateGrads(grad, dweights, dh if again else None)


SILU = Gated()


class _ScaledInput:
    """silu(w gate) (w up): the weight multiplies what the expert reads (llama4)."""

    weighs_result, parts = False, 2

    def forward(self, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, room: int) -> torch.Tensor:
        return swiglu(gate_up * _of_rows(weights, routes).to(gate_up.dtype), room)

    def backward(
        self, dh: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, again: bool
    ) -> GateGrads:
        w = _of_rows(weights, routes).to(gate_up.dtype)
        grad = swiglu_backward(dh, gate_up * w, None)[0]
        dweights = (grad * gate_up).sum(1, dtype=weights.dtype)
        return GateGrads(grad.mul_(w), dweights, self.forward(gate_up, weights, routes, 0) if again else None)


SCALED_INPUT = _ScaledInput()


@dataclass(frozen=True)
class Clamped:
    """w (up + 1) gate sigmoid(alpha gate), gate cut to at most `limit`, up to [-limit, limit] (gpt_oss).

    Columns of gate and up lie in turn: gate 0, up 0, gate 1, ...
    """

    alpha: float
    limit: float

    weighs_result, parts = True, 2

    def forward(self, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, room: int) -> torch.Tensor:
        gate, up = self._cut(gate_up)
        size = gate.shape[1]
        X = gate_up.new_empty(gate_up.shape[0], size + room)
        torch.mul(gate * torch.sigmoid(gate * self.alpha), up + 1, out=X[:, :size])
        X[:, :size].mul_(_of_rows(weights, routes))
        return X

    def backward(
        self, dh: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, again: bool
    ) -> GateGrads:
        gate, up = self._cut(gate_up)
        opened = torch.sigmoid(gate * self.alpha)
        glu = gate * opened
        dweights = (dh * glu * (up + 1)).sum(1, dtype=weights.dtype)
        dh.mul_(_of_rows(weights, routes))
        grad = torch.empty_like(gate_up)
        dgate, dup = _in_turn(grad)
        torch.mul(dh * (up + 1), opened * (1 + self.alpha * gate * (1 - opened)), out=dgate)
        torch.mul(dh, glu, out=dup)
        raw_gate, raw_up = _in_turn(gate_up)
        dgate.masked_fill_(raw_gate > self.limit, 0.0)
        dup.masked_fill_(raw_up.abs() > self.limit, 0.0)
        return GateGrads(grad, dweights, self.forward(gate_up, weights, routes, 0) if again else None)

    def _cut(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = _in_turn(gate_up)
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Plain:
    """w act(up), where there is no gate: gate_up is up [M, I]. act: one of megalora.ops.activations.ACTIVATIONS."""

    act: str

    weighs_result, parts = True, 1

    def forward(self, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, room: int) -> torch.Tensor:
        rows, size = gate_up.shape
        X = gate_up.new_empty(rows, size + room)
        X[:, :size] = ACTIVATIONS[self.act](gate_up)
        X[:, :size].mul_(_of_rows(weights, routes))
        return X

    def backward(
        self, dh: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, routes: Routes, again: bool
    ) -> GateGrads:
        with torch.enable_grad():
            up = gate_up.detach().requires_grad_()
            activated = ACTIVATIONS[self.act](up)
        dweights = (dh * activated.detach()).sum(1, dtype=weights.dtype)
        (grad,) = torch.autograd.grad(activated, up, dh.mul_(_of_rows(weights, routes)))
        return GateGrads(grad, dweights, self.forward(gate_up, weights, routes, 0) if again else None)


def _in_turn(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gate_up[:, 0::2], gate_up[:, 1::2]


def _of_rows(weights: torch.Tensor, routes: Routes) -> torch.Tensor:
    """Return the weight of each row [M, 1]."""
    return weights.flatten()[routes.pair, None]
