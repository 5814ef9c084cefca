"""Rotary position embedding (Su et al. 2021): the features of a pair are half of the rotated ones apart, as in llama,
or neighbours (`interleaved`), as in the paper, gptj, glm and cohere."""

from __future__ import annotations

import torch

from megalora.ops import extension, limits


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate the pairs (x[j], x[j + n/2]) of each head's first n features by the angle of the token's position.

    x [T, H, D]; cos, sin [T, n / 2] in x's dtype; interleaved: the pairs are (x[2 j], x[2 j + 1]). The backward pass is
    the rotation by the opposite angle.
    """
    return _Rope.apply(x, cos, sin, interleaved)


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and the second features of all pairs, as views."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def _rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    size = 2 * cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if size < x.shape[-1]:
        out[..., size:].copy_(x[..., size:])
    first, second = _pairs(x[..., :size], interleaved)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    left, right = _pairs(out[..., :size], interleaved)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved=interleaved)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin, interleaved=ctx.interleaved), None, None, None


def split_rope(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut qkv into heads and rotate those of q and k.

    qkv [T, (H + 2 K) D], the query heads, then the key heads, then the value heads; cos, sin [T, n / 2]: the first
         n features of a head are rotated, in pairs as `rope` says
    Returns q [T, H, D], k [T, K, D], v [T, K, D].
    """
    return _SplitRope.apply(qkv, cos, sin, heads, kv_heads, interleaved)


def _compiled(qkv: torch.Tensor, head_dim: int, cos: torch.Tensor) -> bool:
    """Return whether kernels take it: whole heads, on a CPU no float16; on a GPU no float64, half heads on 16 bytes."""
    if not (extension.has_kernels(qkv.device.type) and qkv.is_contiguous() and 2 * cos.shape[-1] == head_dim):
        return False
    if qkv.device.type == "cpu":
        return qkv.dtype != torch.float16
    return qkv.dtype != torch.float64 and head_dim % (2 * limits.OCTET) == 0


class _SplitRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, heads, kv_heads, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.cut, ctx.interleaved = [heads, kv_heads, kv_heads], interleaved
        parts = qkv.unflatten(-1, (sum(ctx.cut), -1))
        if not interleaved and _compiled(qkv, parts.shape[2], cos):
            q, k, v = (parts.new_empty(parts.shape[0], count, parts.shape[2]) for count in ctx.cut)
            torch.ops.megalora.split_rope_(qkv, cos, sin, q, k, v)
            return q, k, v
        q, k, v = parts.split(ctx.cut, dim=1)
        return *(_rotate(x, cos, sin, interleaved=interleaved) for x in (q, k)), v.contiguous()

    @staticmethod
    def backward(ctx, dq, dk, dv):
        cos, sin = ctx.saved_tensors
        grad = dq.new_empty(dq.shape[0], sum(ctx.cut), dq.shape[2])
        if not ctx.interleaved and _compiled(grad.flatten(1), dq.shape[2], cos):
            dq, dk, dv = (x if x.stride(2) == 1 else x.contiguous() for x in (dq, dk, dv))
            torch.ops.megalora.split_rope_backward_(dq, dk, dv, cos, sin, grad.flatten(1))
        else:
            for out, grad_out in zip(grad.split(ctx.cut, dim=1)[:2], (dq, dk), strict=True):
                _rotate(grad_out, cos, -sin, out, ctx.interleaved)
            grad[:, ctx.cut[0] + ctx.cut[1] :] = dv
        return grad.flatten(1), None, None, None, None, None
