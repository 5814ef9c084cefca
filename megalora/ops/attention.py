"""Causal attention within documents: a kernel of our own on the CPU; elsewhere torch's SDPA, one call a run of
documents of one length, or on a GPU one call of FlashAttention's kernels for documents of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megalora.ops import extension

# On Hopper cuDNN's kernels are well ahead of FlashAttention-2; torch takes the first that can run.
_GPU_BACKENDS: list[SDPBackend] = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# cuDNN plans each new shape for tens of milliseconds: training repeats its shapes, the prompts of generation do not.
_GPU_BACKENDS_OF_ANY_SHAPE: list[SDPBackend] = [b for b in _GPU_BACKENDS if b != SDPBackend.CUDNN_ATTENTION]


@dataclass(frozen=True)
class Packed:
    """The documents of a microbatch for kernels that read their bounds on the device.

    cu_seqlens  [N + 1] int32, cumulative, with empty documents behind the last
    longest     no document is longer
    Both are rounded up to few values, so that few CUDA graphs serve all microbatches.
    """

    cu_seqlens: torch.Tensor
    longest: int


def packs(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel that reads the documents' bounds on the device."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
    )


def pack(bounds: Sequence[int], head_dim: int, dtype: torch.dtype, device: torch.device) -> Packed | None:
    """The Packed of these cumulative bounds; None where no kernel takes it."""
    if not packs(head_dim, dtype, device):
        return None
    documents = len(bounds) - 1
    step = max(8, 1 << documents.bit_length() >> 3)  # at most a quarter more documents than there are
    bounds = [*bounds, *[bounds[-1]] * (-documents % step)]
    longest = max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
    return Packed(cu_seqlens, max(128, 1 << (longest - 1).bit_length()))


def is_even(bounds: Sequence[int]) -> bool:
    """Whether all documents are of one length."""
    return len(_runs(bounds)) == 1


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: Sequence[int],
    window: int | None = None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """Softmax attention in which a token sees its own document up to itself.

    q [T, H, D]; k, v [T, K, D] with K dividing H (query head h reads head h * K // H); scale 1 / sqrt(D).
    bounds  cumulative bounds of the documents in T, as ints, from 0 to T
    window  a token sees itself and the window - 1 tokens before it; None: all before it
    packed  the same bounds on the device: documents of several lengths, and windows, are then one call
    Returns [T, H, D].
    """
    if _compiled(q):
        return _TiledAttention.apply(q, k, v, tuple(bounds), len(q) if window is None else window)
    runs = _runs(bounds)
    if packed is not None and (len(runs) > 1 or (window is not None and window < runs[0][2])):
        return _flash(q, k, v, packed, window)
    if len(runs) == 1:  # no slices: in backward each would be a copy
        return _run(q, k, v, runs[0], window)
    parts = [slice(start, start + count * length) for start, count, length in runs]
    return torch.cat([_run(q[p], k[p], v[p], run, window) for p, run in zip(parts, runs, strict=True)])


def _compiled(q: torch.Tensor) -> bool:
    """Whether our kernel takes it (csrc/cpu/attention.cpp): torch's is less than half as fast."""
    return q.device.type == "cpu" and extension.has_kernels("cpu") and q.dtype != torch.float16 and len(q) > 0


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bounds, window):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
        torch.ops.megalora.attention_(q, k, v, bounds, window, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.bounds, ctx.window = bounds, window
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        dq = torch.empty(q.shape, dtype=q.dtype)
        shares = [torch.empty(q.shape, dtype=lse.dtype) for _ in range(2)]  # of each query head
        torch.ops.megalora.attention_backward_(dout, q, k, v, out, lse, ctx.bounds, ctx.window, dq, *shares)
        dk, dv = (share.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype) for share in shares)
        return dq, dk, dv, None, None


def cached_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Attention of the last N tokens of one sequence over all S of it (generation; N <= S).

    q [N, H, D]; k, v [S, K, D]. Returns [N, H, D].
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return _causal(q, k, v, window).squeeze(0).transpose(0, 1)


def _runs(bounds: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, count, length) of each run of neighbouring documents of one length."""
    runs: list[tuple[int, int, int]] = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        length = stop - start
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((start, 1, length))
    return runs


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: tuple[int, int, int], window: int | None
) -> torch.Tensor:
    q, k, v = [x.unflatten(0, run[1:]).transpose(1, 2) for x in (q, k, v)]
    return _causal(q, k, v, window).transpose(1, 2).flatten(0, 1)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, window: int | None) -> torch.Tensor:
    """As `attention`. torch.nn.attention.varlen is this op too, but before torch 2.12 without heads that share keys."""
    bounds, longest = packed.cu_seqlens, packed.longest
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    causal, dropout = True, 0.0
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, bounds, bounds, longest, longest, dropout, causal, False, **sides)[0]


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """q [B, H, N, D], k, v [B, K, S, D] -> [B, H, N, D]; query n stands at position S - N + n."""
    if q.device.type == "cuda":
        backends = _GPU_BACKENDS_OF_ANY_SHAPE if torch.is_inference_mode_enabled() else _GPU_BACKENDS
        with sdpa_kernel(backends, set_priority=True):
            return _attend(q, k, v, window)
    return _attend(q, k, v, window)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    queries, keys = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if queries == keys and (window is None or keys <= window):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if queries == 1 and (window is None or keys <= window):
        return scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    behind = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=gqa)
