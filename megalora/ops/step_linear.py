"""Linears of a few rows (a step of generation) on GPUs, with what stands before and behind them in one kernel:

    sum = x + delta        y = norm(sum) W^T + bias        or act(gate) * up, where the outputs are [gate | up]

Each step is rounded to the tensors' dtype, as one after the other would be: a step of generation is a chain of kernels
of a few microseconds each, and between two of them the GPU waits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megalora.ops import extension, limits
from megalora.ops.fused_norm import NormWeights


class Beside(NamedTuple):
    """What is done beside a product.

    delta  [M, I] what is added to x before the norm; None: nothing
    norm   RMSNorm of x (+ delta); None: x is read as it is
    act    one of swiglu.ACTS: the outputs are [gate | up], and leave as act(gate) * up; None: as they are
    """

    delta: torch.Tensor | None = None
    norm: NormWeights | None = None
    act: str | None = None

    def arguments(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """Return (x + delta, to be written by the op, and what the op takes of all this)."""
        total = x if self.delta is None else torch.empty_like(x)
        weight, eps, kind = (None, 0.0, "") if self.norm is None else (self.norm.weight, self.norm.eps, self.norm.kind)
        rounding = kind.startswith("precise"), kind.endswith("_offset")
        written = None if self.delta is None else total
        return total, (self.delta, written, weight, eps, *rounding, self.act or "none")


def is_step(x: torch.Tensor) -> bool:
    """Return whether x [M, I] may be of such a step: a few rows on a GPU, and nothing to differentiate."""
    return x.is_cuda and len(x) <= limits.MOST_SKINNY_ROWS and not torch.is_grad_enabled()


def takes(x: torch.Tensor, beside: Beside) -> bool:
    """Return whether kernels do what is `beside` a product of x [M, I]: 16-bit floats on a GPU, a few rows.

    Of formats that have such kernels: FrozenMatrix.takes_beside says so.
    """
    if not (is_step(x) and x.itemsize == 2 and extension.has_kernels("cuda")):
        return False
    tensors = [x]
    if beside.norm is not None:
        if beside.norm.centred or x.shape[1] > limits.LARGEST_NORMED_ROW or x.numel() > limits.MOST_NORMED:
            return False
        tensors += [one for one in (beside.delta, beside.norm.weight) if one is not None]
    return all(_is_aligned(one) and one.dtype == x.dtype for one in tensors)


def _is_aligned(x: torch.Tensor) -> bool:
    octets = (x.shape[-1], x.data_ptr() // x.itemsize, *(x.stride()[:-1] if x.shape[0] > 1 else ()))
    return x.is_contiguous() and all(n % limits.OCTET == 0 for n in octets)


def step_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, beside: Beside
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x + delta [M, I], y [M, O] or, with an activation, [M, O / 2]), of x that `takes` has let pass.

    weight [O, I], rows on 16 bytes; bias [O]. Not for autograd.
    """
    total, arguments = beside.arguments(x)
    return total, torch.ops.megalora.step_linear(x, weight, bias, *arguments)


def step_down_(x: torch.Tensor, A: torch.Tensor, beside: Beside, X: torch.Tensor) -> torch.Tensor:
    """Write [n | z | 0] into X [M, I + C], n = norm(x + delta) and z = n A^T; return x + delta.

    x   [M, I] that `takes` has let pass, or without a norm `is_step`; X may begin with it then
    A   [R, I] with R <= C, rows on 16 bytes, which no kernel of a step writes
    """
    total, (*before, _) = beside.arguments(x)
    torch.ops.megalora.step_down_(x, A, *before, X)
    return total


def fp8_step_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    branch: torch.Tensor,
    bias: torch.Tensor | None,
    kept: bool,
    beside: Beside,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same of the weight codes [O, I] e4m3 * scale [O] float32, with branch [O, C] behind it where x has C
    columns more and is not normed.

    kept: codes and scale are not written between steps
    """
    total, arguments = beside.arguments(x)
    return total, torch.ops.megalora.fp8_step_linear(x, codes, scale, branch, bias, kept, *arguments)
