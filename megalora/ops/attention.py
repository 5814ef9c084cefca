"""Attention within documents: a kernel of our own on the CPU; elsewhere torch's SDPA, one call a run of documents of
one length, or on a GPU one call of FlashAttention's kernels for documents of several lengths, or of our own (see
megalora.ops.fused_attention.outruns_flash); causal documents of LONG_DOCUMENT tokens or more go to cuDNN's some heads
at a time (megalora.ops.merged_attention). What torch's kernels do not compute (softcap, ALiBi, sinks, offsets,
dropout) is a kernel of our own on a GPU in 16 bits (megalora.ops.fused_attention), and else goes in tiles of plain
torch (megalora.ops.tiled_attention)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megalora.ops import extension
from megalora.ops.fused_attention import Documents, fused_attention, fuses, outruns_flash
from megalora.ops.merged_attention import merged_attention, takes_pieces
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.ops.tiled_attention import PLAIN, Run, Scores, runs_of, tiled_attention, tiled_cached_attention

__all__ = [
    "MOST_FEATURES", "PLAIN", "Packed", "Scores", "attention", "cached_attention", "in_chunks", "is_even", "pack",
    "packs",
]  # fmt: skip

_SCORED = 1 << 26  # scores, or entries of a mask, at a time, where new tokens see those of a cache
MOST_FEATURES = 256  # of a head, in FlashAttention's kernels
LONG_DOCUMENT = 32768  # tokens from which on the backward pass goes by some heads at a time, for its workspace
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
    """Return whether there is a kernel that reads the documents' bounds on the device."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= MOST_FEATURES
    )


def pack(bounds: Sequence[int], head_dim: int, dtype: torch.dtype, device: torch.device) -> Packed | None:
    """Return the Packed of these cumulative bounds; None where no kernel takes it."""
    if not packs(head_dim, dtype, device):
        return None
    documents = len(bounds) - 1
    step = max(8, 1 << documents.bit_length() >> 3)  # at most a quarter more documents than there are
    bounds = [*bounds, *[bounds[-1]] * (-documents % step)]
    longest = max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
    return Packed(cu_seqlens, max(128, 1 << (longest - 1).bit_length()))


def in_chunks(bounds: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Return the cumulative bounds of documents with each cut at the multiples of `chunk` tokens from its start."""
    starts = (range(start, stop, chunk) for start, stop in zip(bounds[:-1], bounds[1:], strict=True))
    return (*(place for document in starts for place in document), bounds[-1])


def is_even(bounds: Sequence[int]) -> bool:
    """Return whether all documents are of one length."""
    return len(runs_of(bounds)) == 1


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: Sequence[int],
    window: int | None = None,
    packed: Packed | None = None,
    scores: Scores = PLAIN,
    dropout: ProbabilityDropout | None = None,
) -> torch.Tensor:
    """Return softmax attention in which a token sees its own document up to itself, or all of it where scores are not
    causal.

    q [T, H, D]; k, v [T, K, D] with K dividing H (query head h reads head h * K // H).
    bounds  cumulative bounds of the documents in T, as ints, from 0 to T
    window  a token sees itself and the window - 1 tokens before it, not causal: and as many behind it; None: all
    packed  the same bounds on the device: documents of several lengths, and windows, are then one call
    scores  scale, softcap, ALiBi and causality
    dropout of the probabilities
    Returns [T, H, D].
    """
    if (dropout is not None or not scores.simple) and fuses(q.shape[2], q.dtype, q.device):
        return fused_attention(q, k, v, documents_of(bounds, packed, q.device), window, scores, dropout)
    if dropout is not None:
        return tiled_attention(q, k, v, runs_of(bounds), window, scores, dropout)
    if scores.causal and scores.offsets is None and _compiled(q):
        return _CompiledAttention.apply(q, k, v, tuple(bounds), len(q) if window is None else window, scores)
    runs = runs_of(bounds)
    if not scores.simple or (q.device.type == "cpu" and not scores.causal):
        return tiled_attention(q, k, v, runs, window, scores)
    if window is None and scores.causal and len(runs) == 1 and runs[0].length >= LONG_DOCUMENT:
        spans = [(start, start + runs[0].length) for start in range(0, len(q), runs[0].length)]
        if q.shape[2] == v.shape[2] and takes_pieces(q.shape[2], q.dtype, q.device, [runs[0].length] * runs[0].count):
            return merged_attention(q, k, v, bounds, spans, scores.scale)
    if q.shape[2] > MOST_FEATURES:
        packed = None
    if packed is not None and (len(runs) > 1 or (window is not None and window < runs[0].length)):
        # Prompts of generation do not wait for Triton's compiler.
        if outruns_flash(q, v) and not torch.is_inference_mode_enabled():
            return fused_attention(q, k, v, documents_of(bounds, packed, q.device), window, scores, None)
        return _flash(q, k, v, packed, window, scores)
    if len(runs) == 1:  # no slices: in backward each would be a copy
        return _run(q, k, v, runs[0], window, scores)
    parts = [slice(start, start + count * length) for start, count, length in runs]
    return torch.cat([_run(q[p], k[p], v[p], run, window, scores) for p, run in zip(parts, runs, strict=True)])


def documents_of(bounds: Sequence[int], packed: Packed | None, device: torch.device) -> Documents:
    """Return where documents with these cumulative bounds begin, for kernels of our own; packed: as `attention`."""
    runs = runs_of(bounds)
    if len(runs) == 1:
        return Documents(runs[0].count, runs[0].length)
    if packed is not None:
        return Documents(len(packed.cu_seqlens) - 1, packed.longest, packed.cu_seqlens)
    on_device = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
    return Documents(len(bounds) - 1, max(run.length for run in runs), on_device)


def _compiled(q: torch.Tensor) -> bool:
    """Return whether our kernel takes it (csrc/cpu/attention.cpp): torch's is less than half as fast."""
    return q.device.type == "cpu" and extension.has_kernels("cpu") and q.dtype != torch.float16 and len(q) > 0


class _CompiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bounds, window, scores):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
        scale = q.shape[2] ** -0.5 if scores.scale is None else scores.scale
        slopes, sinks = (None if x is None else x.to(lse.dtype).contiguous() for x in (scores.slopes, scores.sinks))
        how = bounds, window, scale, scores.softcap or 0.0, slopes
        torch.ops.megalora.attention_(q, k, v, *how, sinks, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        dq = torch.empty(q.shape, dtype=q.dtype)
        shares = [torch.empty(q.shape, dtype=lse.dtype) for _ in range(2)]  # of each query head
        torch.ops.megalora.attention_backward_(dout, q, k, v, out, lse, *ctx.how, dq, *shares)
        dk, dv = (share.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype) for share in shares)
        return dq, dk, dv, None, None, None


def cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None, scores: Scores = PLAIN
) -> torch.Tensor:
    """Return causal attention of the last N tokens of one sequence over all S of it (generation; N <= S).

    q [N, H, D]; k, v [S, K, D]. Returns [N, H, D].
    """
    assert scores.causal
    if not scores.simple:
        return tiled_cached_attention(q, k, v, window, scores)
    new, held = len(q), len(k)
    if 1 < new < held and (window is None or held <= window) and packs(q.shape[2], q.dtype, q.device):
        # "causal" means the lower right corner to this op, as to torch.nn.attention.bias.causal_lower_right.
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, 0.0, True, False, scale=scores.scale)[0].squeeze(0).transpose(0, 1)
    most = max(1, _SCORED // (held * (q.shape[1] if q.device.type == "cpu" else 1)))
    if new > most and new < held:  # the mask, and on a CPU the scores, are of so many queries at a time
        stops = range(0, new, most)
        parts = [slice(start, min(new, start + most)) for start in stops]
        seen = [held - new + part.stop for part in parts]
        outputs = (
            cached_attention(q[p], k[:stop], v[:stop], window, scores) for p, stop in zip(parts, seen, strict=True)
        )
        return torch.cat(list(outputs))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return _sdpa(q, k, v, window, scores).squeeze(0).transpose(0, 1)


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run, window: int | None, scores: Scores
) -> torch.Tensor:
    q, k, v = [x.unflatten(0, run[1:]).transpose(1, 2) for x in (q, k, v)]
    return _sdpa(q, k, v, window, scores).transpose(1, 2).flatten(0, 1)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, window: int | None, scores: Scores
) -> torch.Tensor:
    """Do as `attention`. torch.nn.attention.varlen is this op too, but before torch 2.12 without heads that share keys.
    """
    bounds, longest = packed.cu_seqlens, packed.longest
    sides: dict[str, int] = {}
    if window is not None:
        sides = {"window_size_left": window - 1, "window_size_right": 0 if scores.causal else window - 1}
    dropout = 0.0
    forward = torch.ops.aten._flash_attention_forward
    return forward(
        q, k, v, bounds, bounds, longest, longest, dropout, scores.causal, False, scale=scores.scale, **sides
    )[0]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scores: Scores) -> torch.Tensor:
    """Map q [B, H, N, D], k, v [B, K, S, D] to [B, H, N, D]; query n stands at position S - N + n."""
    if q.device.type == "cuda":
        backends = _GPU_BACKENDS_OF_ANY_SHAPE if torch.is_inference_mode_enabled() else _GPU_BACKENDS
        with sdpa_kernel(backends, set_priority=True):
            return _attend(q, k, v, window, scores)
    return _attend(q, k, v, window, scores)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scores: Scores) -> torch.Tensor:
    queries, keys = q.shape[2], k.shape[2]
    how: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1], "scale": scores.scale}
    everywhere = window is None or keys <= window
    if everywhere and (not scores.causal or queries == 1):
        return scaled_dot_product_attention(q, k, v, **how)
    if everywhere and queries == keys:
        return scaled_dot_product_attention(q, k, v, is_causal=True, **how)
    behind = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    seen = behind >= 0 if scores.causal else behind > -keys
    if window is not None:
        seen = seen & (behind.abs() < window)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, **how)
