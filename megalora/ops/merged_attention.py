"""Causal attention of pieces of documents by cuDNN's kernels, which take squares and rectangles but no rows of pieces.

A piece's queries see the keys of their own piece up to themselves, a causal square, and all keys of their document
before it, a rectangle: two calls, whose results are merged by the logsumexp of their scores. In backward each call is
given the merged result and logsumexp, with which its probabilities, and so its gradients, are parts of the whole's. On
Hopper their rate is about 1.5 times that of FlashAttention-2 on all pieces at once (megalora.ops.piece_attention).
Backward goes by some heads at a time: with all heads of a long document the kernel's workspace would be many GiB.

Legend: T queries of all pieces, n of one, S keys, m of one call, H query and K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

_MERGED = 1 << 22  # elements that are merged at a time, in float32
_WORKSPACE = 1 << 30  # bytes of a call's workspace in backward, at most where there are enough heads to cut
MOST_PIECES = 16  # of a microbatch: more calls than these take longer than they save
FEWEST_TOKENS = 2048  # of a piece on average; a shorter one keeps no GPU busy


class Kernel(Protocol):
    """Attention of one call: q [n, H, D] over k, v [m, K, D]; causal: n = m, and a token sees itself and those before.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the attention [n, H, D], the logsumexp of the scores [H, n], in at least float32)."""
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (dq [n, H, D], dk, dv [m, K, D]); out and lse may be those over more keys than these."""
        ...


class Cudnn:
    """torch's ops on cuDNN, without dropout."""

    def forward(self, q, k, v, causal, scale):
        q, k, v = (_by_head(x) for x in (q, k, v))
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return _by_token(found[0]), found[1].flatten(2).squeeze(0)

    def backward(self, dout, q, k, v, out, lse, causal, scale):
        dout, q, k, v, out = (_by_head(x) for x in (dout, q, k, v, out))
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, of which there is none
        lse, queries, keys = lse.contiguous()[None, :, :, None], q.shape[2], k.shape[2]
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, seed, None, None, None, queries, keys, 0.0, causal, scale=scale
        )
        return tuple(_by_token(x) for x in grads)


def takes_pieces(head_dim: int, dtype: torch.dtype, device: torch.device, lengths: Sequence[int]) -> bool:
    """Return whether pieces of so many tokens go this way: few long ones, where `merges`."""
    return dtype in (torch.bfloat16, torch.float16) and are_long(head_dim, lengths) and merges(device)


def merges(device: torch.device) -> bool:
    """Return whether anything goes this way: on a GPU from Hopper on, and not where sums must have a fixed order, which
    those of cuDNN's backward have not.
    """
    return (
        device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
        and torch.backends.cudnn.is_available()
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def are_long(head_dim: int, lengths: Sequence[int]) -> bool:
    """Return whether pieces of so many tokens are worth calls of their own, with heads that cuDNN takes."""
    long = 0 < len(lengths) <= MOST_PIECES and sum(lengths) >= FEWEST_TOKENS * len(lengths) and min(lengths) >= 64
    return long and head_dim % 8 == 0 and head_dim <= 128


def heads_at_once(kv_heads: int, group: int, head_dim: int, queries: int, keys: int) -> int:
    """Return how many of `kv_heads` go into one call of backward, each with its `group` query heads."""
    return max(1, min(kv_heads, _WORKSPACE // (group * workspace_bytes(head_dim, queries, keys))))


def workspace_bytes(head_dim: int, queries: int, keys: int) -> int:
    """Return what cuDNN's backward needs for one query head in 16 bits: dq in float32, and that head's dk and dv."""
    return 4 * head_dim * (queries + keys)


def merged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: Sequence[int],
    spans: Sequence[tuple[int, int]],
    scale: float | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Return the attention [T, H, D] of q [T, H, D], whose pieces have the cumulative bounds `queries`, over k, v
    [S, K, D].

    spans  of each piece its keys in S: those of its own queries are the last
    """
    pieces = tuple(zip(queries[:-1], queries[1:], spans, strict=True))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return _Merged.apply(q, k, v, pieces, scale, kernel or Cudnn())


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pieces, scale, kernel):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
        for rows, calls in _calls(pieces):
            found, sums = None, None
            for keys, causal in calls:
                part = kernel.forward(q[rows], k[keys], v[keys], causal, scale)
                if found is None:
                    found, sums = part
                else:
                    sums = _merge_(found, sums, *part)
            out[rows], lse[:, rows] = found, sums
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = pieces, scale, kernel
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        pieces, scale, kernel = ctx.how
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        for rows, calls in _calls(pieces):
            for number, (keys, causal) in enumerate(calls):
                for own, of_keys in _heads(q, k, rows, keys):
                    of = dout[rows, own], q[rows, own], k[keys, of_keys], v[keys, of_keys], out[rows, own]
                    grads = kernel.backward(*of, lse[own, rows], causal, scale)
                    dq[rows, own] = grads[0] if number == 0 else dq[rows, own] + grads[0]
                    dk[keys, of_keys] += grads[1]
                    dv[keys, of_keys] += grads[2]
                    del grads  # before the next call's are made
        return dq, dk, dv, None, None, None


def _calls(pieces) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """Yield of each piece its queries and its calls: (keys, whether it is the causal square)."""
    for a, b, (start, stop) in pieces:
        own = stop - (b - a)
        assert start <= own, (a, b, start, stop)
        yield slice(a, b), [(slice(own, stop), True), *([(slice(start, own), False)] if start < own else [])]


def _heads(q: torch.Tensor, k: torch.Tensor, rows: slice, keys: slice) -> Iterator[tuple[slice, slice]]:
    """Yield (query heads, key heads) of each call of backward."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    step = heads_at_once(kv_heads, group, q.shape[2], rows.stop - rows.start, keys.stop - keys.start)
    for first in range(0, kv_heads, step):
        stop = min(kv_heads, first + step)
        yield slice(group * first, group * stop), slice(first, stop)


def _merge_(a: torch.Tensor, lse_a: torch.Tensor, b: torch.Tensor, lse_b: torch.Tensor) -> torch.Tensor:
    """Make a [n, H, D] the attention over the keys of both a and b, in place; return its logsumexp [H, n]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight = (lse_b - lse).exp_().t().unsqueeze(-1)  # of b
    size = max(1, _MERGED // a[0].numel())
    for into, more, part in zip(a.split(size), b.split(size), weight.split(size), strict=True):
        into.copy_(torch.lerp(into.to(weight.dtype), more.to(weight.dtype), part))
    return lse


def _by_head(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _by_token(x: torch.Tensor) -> torch.Tensor:
    return x.squeeze(0).transpose(0, 1)
