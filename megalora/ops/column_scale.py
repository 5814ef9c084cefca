"""Columns of an activation, each times its own factor: y = x * g (+ bias), its backward pass and the gradient of g.

x is [T, O] in the compute dtype; g [O] is float32 (float64 where x is), since a factor in 16 bits would move in steps
of half a percent.
"""

from __future__ import annotations

import torch


def scale_columns(x_TO: torch.Tensor, g_O: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return x * g (+ bias) [T, O] in x's dtype."""
    y = torch.mul(x_TO, g_O, out=torch.empty_like(x_TO))
    return y if bias_O is None else y.add_(bias_O)


def scale_columns_(x_TO: torch.Tensor, g_O: torch.Tensor) -> torch.Tensor:
    """Multiply x by g in place; return it."""
    return x_TO.mul_(g_O)


def scale_columns_backward(
    dy_TO: torch.Tensor, y_TO: torch.Tensor | None, g_O: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (dy * g [T, O] in dy's dtype, the sum over T of dy * y [O] in g's dtype; None where y is None)."""
    dots = None if y_TO is None else torch.sum(dy_TO * y_TO, 0, dtype=g_O.dtype)
    return torch.mul(dy_TO, g_O, out=torch.empty_like(dy_TO)), dots
