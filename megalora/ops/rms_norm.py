"""RMSNorm with a frozen weight (Zhang and Sennrich 2019), as HF computes it, alone or with the residual sum before it.

HF's models round in three ways: to the compute dtype before the weight is applied (llama); after it, the weight applied
in float32 (olmo2, glm: `precise`); and after it, where the weight is 1 + w (gemma: `precise` and `offset`).

Only the normed input and one number a row are kept for backward. `room` columns are left behind the result for whoever
reads it, undefined there (see megalora.ops.lora_linear).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megalora.ops import extension, fused_norm
from megalora.ops.fused_norm import NormWeights


class Rounding(NamedTuple):
    """offset: the weight is 1 + w; precise: the result is rounded behind the weight, not before it."""

    offset: bool = False
    precise: bool = False

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """Return what is multiplied by, in the dtype in which it is: float32 (float64) where precise, else w's."""
        if self.precise:
            w = w.to(torch.promote_types(w.dtype, torch.float32))
        return 1 + w if self.offset else w

    def arguments(self, w: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
        """Return (weight, precise, offset) as the CPU's ops take them: 1 + w is theirs where it is precise."""
        return (w, True, self.offset) if self.precise else (self.weight(w), False, False)

    def weights(self, w: torch.Tensor, eps: float) -> NormWeights:
        """Return them as the kernels of a GPU take them."""
        kind = "precise" if self.precise else "rms"
        return NormWeights(f"{kind}_offset" if self.offset else kind, w, None, eps)


LLAMA = Rounding()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, room: int = 0, rounding: Rounding = LLAMA
) -> torch.Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in at least float32.

    x [..., D]; weight [D], frozen: it gets no gradient. Returns [..., D + room].
    """
    norm = rounding.weights(weight, eps)
    if fused_norm.takes(x, norm, room):
        return fused_norm.fused_norm(x, norm, room)
    return _RmsNorm.apply(x, weight, eps, room, rounding)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, room: int = 0, rounding: Rounding = LLAMA
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x + delta [N, D], rms_norm(x + delta) [N, D + room]), in one pass where compiled; x, delta [N, D]."""
    norm = rounding.weights(weight, eps)
    if fused_norm.takes(x, norm, room):
        return fused_norm.add_fused_norm(x, delta, norm, room)
    return _AddRmsNorm.apply(x, delta, weight, eps, room, rounding)


def _forward(x, delta, weight, eps, room, rounding):
    """Compute (sum, y with room, inverse [..., 1]); sum is x where delta is None."""
    size = x.shape[-1]
    y = x.new_empty(*x.shape[:-1], size + room)
    if _compiled(x) and weight.dtype == x.dtype:
        rows, (w, precise, offset) = x.numel() // size, rounding.arguments(weight)
        inverse = torch.empty(rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        total = x if delta is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.ops.megalora.rms_norm_(
            _rows(x),
            None if delta is None else _rows(delta).contiguous(),
            w,
            eps,
            None if delta is None else _rows(total),
            _rows(y)[:, :size],
            inverse,
            precise,
            offset,
        )
        return total, y, inverse
    weight = rounding.weight(weight)
    total = x if delta is None else x + delta
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vecdot(wide, wide).div_(size).add_(eps).rsqrt_().unsqueeze(-1)
    if rounding.precise:
        y[..., :size].copy_((wide * inverse).mul_(weight))
    else:
        torch.mul(weight, (wide * inverse).to(x.dtype), out=y[..., :size])
    return total, y, inverse


def _backward(dy, x, weight, inverse, residual, rounding):
    """Compute d(x), plus `residual` where there is one. With n = x r and dn = dy w: dx = r (dn - n mean(dn n))."""
    size = x.shape[-1]
    if _compiled(x) and weight.dtype == x.dtype and dy.stride(-1) == 1:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        before = None if residual is None else _rows(residual).contiguous()
        w, precise, offset = rounding.arguments(weight)
        torch.ops.megalora.rms_norm_backward_(
            _rows(dy)[:, :size], _rows(x), w, inverse, before, _rows(dx), precise, offset
        )
        return dx
    weight = rounding.weight(weight)
    inverse = inverse.view(*x.shape[:-1], 1)
    normed = x.to(inverse.dtype) * inverse
    dn = (dy[..., :size] * weight).to(inverse.dtype)
    mean = torch.linalg.vecdot(dn, normed).div_(size).unsqueeze(-1)
    dx = dn.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype)
    return dx if residual is None else dx.add_(residual)


def _compiled(x: torch.Tensor) -> bool:
    """Return whether a kernel of the CPU takes x: not in float16."""
    return x.device.type == "cpu" and extension.has_kernels("cpu") and x.is_contiguous() and x.dtype != torch.float16


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, room, rounding):
        x = x.contiguous() if extension.has_kernels(x.device.type) else x
        _, y, inverse = _forward(x, None, weight, eps, room, rounding)
        ctx.save_for_backward(x, weight, inverse)
        ctx.rounding = rounding
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, inverse = ctx.saved_tensors
        return _backward(dy, x, weight, inverse, None, ctx.rounding), None, None, None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps, room, rounding):
        total, y, inverse = _forward(x, delta, weight, eps, room, rounding)
        ctx.save_for_backward(total, weight, inverse)
        ctx.rounding = rounding
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        x, weight, inverse = ctx.saved_tensors
        dx = dtotal if dy is None else _backward(dy, x, weight, inverse, dtotal, ctx.rounding)
        return dx, dx, None, None, None, None
