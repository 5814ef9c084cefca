"""Activations of MLPs, by HF's name (transformers.activations.ACT2FN): all that have no parameters, and xIELU.

An activation keeps one tensor for its backward pass: what it reads, or its result (`KEEPS_RESULT`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch.nn import functional

from megalora.ops.extension import has_triton

Activation = Callable[[torch.Tensor], torch.Tensor]
BLOCK = 1 << 24  # numbers; temporaries of as many are little beside a model, and kernels on them fill a GPU


class _FromInput(torch.autograd.Function):
    """An activation of several operations that keeps what it reads, and runs again in backward."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.save_for_backward(x)
        ctx.function = function
        return _by_blocks(function, x)

    @staticmethod
    def backward(ctx, dy):
        def gradient(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(ctx.function(x), x, dy)[0]

        return _by_blocks(gradient, *ctx.saved_tensors, dy), None


def _by_blocks(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Return an elementwise function of tensors [T, ...], which has temporaries of BLOCK numbers, not of all."""
    rows = max(1, BLOCK // max(1, math.prod(tensors[0].shape[1:])))
    if len(tensors[0]) <= rows:
        return function(*tensors)
    out = torch.empty_like(tensors[0])
    for made, *parts in zip(out.split(rows), *(tensor.split(rows) for tensor in tensors), strict=True):
        made.copy_(function(*parts))
    return out


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return functional.relu(x).square_()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return functional.relu(x).mul_(dy).mul_(2)


def _composed(function: Activation) -> Activation:
    return lambda x: _FromInput.apply(x, function)


_gelu_tanh = functools.partial(functional.gelu, approximate="tanh")
_silu = functional.silu

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_10": _composed(lambda x: functional.gelu(x).clip(-10, 10)),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": functional.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": functional.hardswish,
    "laplace": _composed(lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))),
    "leaky_relu": functional.leaky_relu,
    "linear": lambda x: x,
    "mish": functional.mish,
    "quick_gelu": _composed(lambda x: x * torch.sigmoid(1.702 * x)),
    "relu": functional.relu,
    "relu2": _SquaredRelu.apply,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": _silu,
    "sqrtsoftplus": _composed(lambda x: functional.softplus(x).sqrt()),
    "swish": _silu,
    "tanh": torch.tanh,
}


def xielu(
    x: torch.Tensor, alpha_p: torch.Tensor, alpha_n: torch.Tensor, beta: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Return xIELU of x [..., I] (Huang and Schlag 2024, arXiv 2411.13010), in x's dtype:

        a x^2 + beta x  where x > 0,  (expm1(min(x, eps)) - x) (beta + b) + beta x  elsewhere

    with a, b = softplus(alpha_p), softplus(alpha_n). alpha_p, alpha_n [1]; beta, eps []: numbers of the layer, frozen.
    """
    if x.device.type == "cuda" and x.dtype != torch.float64 and x.is_contiguous() and has_triton():
        from megalora.ops.fused_xielu import FusedXIELU

        return FusedXIELU.apply(x, alpha_p, alpha_n, beta, eps)

    def function(x: torch.Tensor) -> torch.Tensor:
        positive = functional.softplus(alpha_p) * x * x + beta * x
        negative = (torch.expm1(torch.min(x, eps)) - x) * (beta + functional.softplus(alpha_n)) + beta * x
        return torch.where(x > 0, positive, negative)

    return _FromInput.apply(x, function)


KEEPS_RESULT = frozenset({"relu", "sigmoid", "tanh"})


class Work(NamedTuple):
    """What a pass of an activation takes. tensors: of the size of its result, read or written; calls: operations."""

    tensors: float
    calls: int


# Forward and backward of those that are several operations of torch; the others are one each way.
_WORK = {
    "gelu_10": (Work(4, 2), Work(14, 8)),
    "laplace": (Work(10, 5), Work(25, 12)),
    "linear": (Work(0, 0), Work(0, 0)),
    "quick_gelu": (Work(7, 3), Work(21, 8)),
    "relu2": (Work(4, 2), Work(7, 3)),
    "sqrtsoftplus": (Work(4, 2), Work(12, 5)),
    "xielu": (Work(29, 15), Work(81, 38)),
}


def work_of(act: str, gated: bool, device_type: str) -> tuple[Work, Work]:
    """Return what forward and backward of an activation take, by itself or in `gated_activation`."""
    forward, backward = Work(2, 1), Work(3, 1)
    if act != "xielu" or device_type != "cuda":  # where that is a kernel
        forward, backward = _WORK.get(act, (forward, backward))
    if not gated:
        return forward, backward
    again = Work(forward.tensors + backward.tensors + 8, forward.calls + backward.calls + 3)
    return Work(forward.tensors + 3, forward.calls + 1), again


def scaled(act: Activation, scale: float) -> Activation:
    """Return act(scale x)."""
    return lambda x: act(x * scale)


def gated_activation(gate_up: torch.Tensor, act: Activation) -> torch.Tensor:
    """Map gate_up [T, 2 I], gate before up to act(gate) * up [T, I], keeping its input only."""
    return _GatedActivation.apply(gate_up, act)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, act):
        ctx.save_for_backward(gate_up)
        ctx.act = act
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        dgate, dup = grad.chunk(2, dim=-1)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.act(leaf)
            (of_gate,) = torch.autograd.grad(activated, leaf, dy * up)
        dgate.copy_(of_gate)
        torch.mul(activated.detach(), dy, out=dup)
        return grad, None
