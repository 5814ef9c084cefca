"""Columns of an activation, each times its own factor: y = x * g (+ bias), its backward pass and the gradient of g.

x is [T, O] in the compute dtype; g [O] is float32 (float64 where x is), since a factor in 16 bits would move in steps
of half a percent.
"""

from __future__ import annotations

import torch

from megalora.ops import extension, limits


def scale_columns(x_TO: torch.Tensor, g_O: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return x * g (+ bias) [T, O] in x's dtype."""
    y = torch.mul(x_TO, g_O, out=torch.empty_like(x_TO))
    return y if bias_O is None else y.add_(bias_O)


def scale_columns_(x_TO: torch.Tensor, g_O: torch.Tensor) -> torch.Tensor:
    """Multiply x by g in place; return it."""
    if _kernels_take(x_TO, g_O):
        torch.ops.megalora.scale_columns_(x_TO, g_O)
        return x_TO
    return x_TO.mul_(g_O)


def scale_columns_backward(
    dy_TO: torch.Tensor, y_TO: torch.Tensor | None, g_O: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (dy * g [T, O] in dy's dtype, the sum over T of dy * y [O] in g's dtype; None where y is None)."""
    dx = torch.empty_like(dy_TO, memory_format=torch.contiguous_format)
    if _kernels_take(dy_TO, g_O) and (y_TO is None or _kernels_take(y_TO, g_O)):
        sums = None
        if y_TO is not None:
            sums = g_O.new_empty(-(-dy_TO.shape[0] // limits.COLUMN_SCALE_ROWS), dy_TO.shape[1])
        torch.ops.megalora.scale_columns_backward_(dy_TO, y_TO, g_O, dx, sums)
        return dx, None if sums is None else sums.sum(0)
    dots = None if y_TO is None else torch.sum(dy_TO * y_TO, 0, dtype=g_O.dtype)
    return torch.mul(dy_TO, g_O, out=dx), dots


def _kernels_take(x: torch.Tensor, g: torch.Tensor) -> bool:
    """Return whether kernels take it: on a GPU, rows on 16 bytes of sizes in eights, factors in float32."""
    return (
        x.device.type == "cuda"
        and extension.has_kernels("cuda")
        and g.dtype == torch.float32
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and x.stride(1) == 1
        and x.shape[1] % limits.OCTET == 0
        and x.stride(0) * x.itemsize % limits.ALIGNMENT == 0
        and x.data_ptr() % limits.ALIGNMENT == 0
    )
