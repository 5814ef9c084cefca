"""Causal attention within documents: torch's SDPA, one call a document (or a run of equal ones)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# On Hopper cuDNN's kernels are well ahead of FlashAttention-2; torch takes the first that can run.
_GPU_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Sequence[int], window: int | None = None
) -> torch.Tensor:
    """Softmax attention in which a token sees its own document up to itself.

    q [T, H, D]; k, v [T, K, D] with K dividing H (query head h reads head h * K // H); scale 1 / sqrt(D).
    bounds  cumulative bounds of the documents in T, as ints, from 0 to T
    window  a token sees itself and the window - 1 tokens before it; None: all before it
    Returns [T, H, D].
    """
    outputs = []
    for start, count, length in _runs(bounds):
        part = slice(start, start + count * length)
        shape = (count, length)
        heads = [x[part].unflatten(0, shape).transpose(1, 2) for x in (q, k, v)]
        outputs.append(_causal(*heads, window).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def cached_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Attention of the last N tokens of one sequence over all S of it (generation; N <= S).

    q [N, H, D]; k, v [S, K, D]. Returns [N, H, D].
    """
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return _causal(*heads, window).squeeze(0).transpose(0, 1)


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


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """q [B, H, N, D], k, v [B, K, S, D] -> [B, H, N, D]; query n stands at position S - N + n."""
    if q.device.type == "cuda":
        with sdpa_kernel(_GPU_BACKENDS, set_priority=True):
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
