"""RMSNorm and LayerNorm on GPUs by one kernel a pass, alone or with what is added to the residual stream before them:

    sum = x + dropout(scale * own(delta))        y = norm(sum)

own a norm of delta alone, or nothing. Each step is rounded to the tensors' dtype, as one after the other would be. What
is kept for backward: the sum and a number a row (LayerNorm: two), and where there is an own norm delta and a number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megalora.ops import extension, limits
from megalora.ops.dropout import Dropout, op_arguments


class NormWeights(NamedTuple):
    """A norm's frozen weights [D].

    kind  "rms", rounded before the weight is applied; "precise", behind it; "layer", LayerNorm, whose weight and bias
          may be None; with "_offset" behind it where the weight is 1 + w
    """

    kind: str
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    @property
    def centred(self) -> bool:
        """Whether it is a LayerNorm."""
        return self.kind.startswith("layer")


class Addend(NamedTuple):
    """What is added of delta: dropout(scale * norm(delta)), each where there is one.

    token_index  [N] int64 of the rows, where `draw` is given
    """

    norm: NormWeights | None = None
    scale: float = 1.0
    token_index: torch.Tensor | None = None
    draw: Dropout | None = None

    @property
    def plain(self) -> bool:
        """Whether it is delta itself."""
        return self.norm is None and self.scale == 1.0 and self.draw is None

    def arguments(self) -> tuple[str, torch.Tensor | None, float]:
        """Return what the ops take of its norm: kind, weight, eps."""
        return ("none", None, 0.0) if self.norm is None else (self.norm.kind, self.norm.weight, self.norm.eps)

    def mask(self) -> tuple[Any, ...]:
        """Return what the ops take of its scale and mask."""
        if self.draw is None:
            return self.scale, None, 0, 0, 0, 0, 0.0, None
        return self.scale, self.token_index, *op_arguments(self.draw)


DELTA = Addend()


def takes(x: torch.Tensor, norm: NormWeights, room: int = 0, addend: Addend = DELTA) -> bool:
    """Return whether kernels take it: on a GPU, not in float64, rows on 16 bytes; a mask or two norms in 16 bits."""
    size = x.shape[-1]
    if x.device.type != "cuda" or x.dtype == torch.float64 or not extension.has_kernels("cuda"):
        return False
    if size % limits.OCTET or room % limits.OCTET or size > limits.LARGEST_NORM:
        return False
    tensors = [norm.weight, norm.bias]
    if addend.norm is not None:
        if addend.norm.kind != norm.kind or norm.centred:
            return False
        tensors.append(addend.norm.weight)
    if (addend.norm is not None or addend.draw is not None) and x.dtype.itemsize != 2:
        return False
    return all(one is None or one.dtype == x.dtype for one in tensors)


def fused_norm(x: torch.Tensor, norm: NormWeights, room: int = 0) -> torch.Tensor:
    """Return norm(x) [..., D + room], undefined in the room, of x [..., D] that kernels take."""
    if not torch.is_grad_enabled():  # prompts of generation wait for the host, and autograd's call takes half its time
        return _forward(x.contiguous(), None, norm, room, DELTA)[1]
    return _Norm.apply(x, norm, room)


def add_fused_norm(
    x: torch.Tensor, delta: torch.Tensor, norm: NormWeights, room: int = 0, addend: Addend = DELTA
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the sum [N, D], its norm [N, D + room]) of x, delta [N, D] that kernels take."""
    if not torch.is_grad_enabled():
        return _forward(x.contiguous(), delta.contiguous(), norm, room, addend)[:2]
    return _AddNorm.apply(x, delta, norm, room, addend)


def _forward(x, delta, norm, room, addend):
    """Return (sum, y with room, statistics, the own norm's statistics)."""
    size = x.shape[-1]
    rows = x.numel() // size
    wide = {"dtype": torch.float32, "device": x.device}
    y = x.new_empty(*x.shape[:-1], size + room)
    total = x if delta is None else torch.empty_like(x)
    statistics = torch.empty(rows * (1 + norm.centred), **wide)
    own = None if addend.norm is None else torch.empty(rows, **wide)
    torch.ops.megalora.norm_(
        _rows(x), norm.kind, norm.weight, norm.bias, norm.eps, delta, *addend.arguments(), *addend.mask(), own,
        None if delta is None else total, _rows(y)[:, :size], statistics,
    )  # fmt: skip
    return total, y, statistics, own


def _backward(dy, x, norm, statistics, residual=None, addend=DELTA, delta=None, own=None):
    """Return (dx, ddelta); they are one tensor where what is added is delta itself."""
    dx = torch.empty_like(x)
    ddelta = None if addend.plain else torch.empty_like(x)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    kind, weight, _ = addend.arguments()
    torch.ops.megalora.norm_backward_(
        _rows(dy)[:, : x.shape[-1]], _rows(x), norm.kind, norm.weight, statistics, residual, delta, kind, weight, own,
        *addend.mask(), _rows(dx), ddelta,
    )  # fmt: skip
    return dx, dx if ddelta is None else ddelta


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, room):
        x = x.contiguous()
        _, y, statistics, _ = _forward(x, None, norm, room, DELTA)
        ctx.save_for_backward(x, statistics, norm.weight)
        ctx.norm = norm._replace(weight=None, bias=None)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, statistics, weight = ctx.saved_tensors
        return _backward(dy, x, ctx.norm._replace(weight=weight), statistics)[0], None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, norm, room, addend):
        x, delta = x.contiguous(), delta.contiguous()
        total, y, statistics, own = _forward(x, delta, norm, room, addend)
        read = delta if addend.norm is not None else None
        own_weight = None if addend.norm is None else addend.norm.weight
        ctx.save_for_backward(total, statistics, norm.weight, read, own, own_weight, addend.token_index)
        own_norm = None if addend.norm is None else addend.norm._replace(weight=None, bias=None)
        ctx.norm, ctx.addend = norm._replace(weight=None, bias=None), addend._replace(norm=own_norm, token_index=None)
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx, dtotal, dy):
        total, statistics, weight, delta, own, own_weight, token_index = ctx.saved_tensors
        norm, addend = ctx.norm._replace(weight=weight), ctx.addend._replace(token_index=token_index)
        if addend.norm is not None:
            addend = addend._replace(norm=addend.norm._replace(weight=own_weight))
        if dy is None:
            dy = torch.zeros_like(total)
        dtotal = None if dtotal is None else dtotal.contiguous()
        dx, ddelta = _backward(dy, total, norm, statistics, dtotal, addend, delta, own)
        return dx, ddelta, None, None, None
