"""DeBERTa's attention on GPUs, by the kernels of megalora.ops.attention_kernels.

A score is scale * (q . k + q . K[r] + k . Q[r]), r the place of query - key. The products of all tokens with all rows
of K and of Q are two matrix products, [T, R] a head in 16 bits, from which the kernels read what a pair needs. The
backward kernels store the gradient of each pair; another sums these by place, each sum in one order, and matrix
products turn the sums into gradients of q, k, K and Q. So a repetition has the same bits. As many heads go at a time
as keep each of these tensors within bounds.

Legend: T tokens, H heads, D head_dim, R rows of K and Q.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from megalora.ops import fused_attention as fused
from megalora.ops.fused_attention import Documents, Places
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.ops.tiled_attention import Scores

_AT_ONCE = 1 << 26  # elements of one product of tokens and rows, or of the pairs of tokens
_FAR = 1 << 30  # farther than any two tokens
_SUMMED = 16, 128, 4  # tokens and places of a tile, warps


def fused_disentangled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    queries: torch.Tensor | None,
    places: torch.Tensor,
    starts: torch.Tensor,
    documents: Documents,
    scores: Scores,
    dropout: ProbabilityDropout | None,
) -> torch.Tensor:
    """Return the attention [T, H, D] of q, k, v [T, H, D], in which a token sees its whole document.

    keys, queries  K and Q [R, H, D]; None: there is no such term
    places, starts  of megalora.ops.disentangled_attention.Positions
    """
    return _Fused.apply(q, k, v, keys, queries, places, starts, documents, scores, dropout)


def starts_of(places: torch.Tensor, count: int) -> torch.Tensor:
    """Return [count + 1] int32: place p is that of query - key from starts[p] to before starts[p + 1].

    places  [2 L + 1], the place of query - key from -L to L, never less than the one before; beyond L as at L
    """
    first = torch.searchsorted(places, torch.arange(count + 1, dtype=places.dtype))
    distance = first - len(places) // 2
    distance = torch.where(first == 0, -_FAR, torch.where(first == len(places), _FAR, distance))
    return distance.int()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, keys, queries, places, starts, documents, scores, dropout):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        ctx.how = documents, scores, dropout
        found = []
        for heads in _parts(q, keys, queries, documents):
            q_h, k_h, v_h, K, Q = _of_heads(heads, q, k, v, keys, queries)
            made = _places(q_h, k_h, K, Q, places)
            found.append(fused.forward(q_h, k_h, v_h, documents, None, scores, _drawn(dropout, heads), made))
        out, lse = _joined([one[0] for one in found], 1), _joined([one[1] for one in found], 0)
        ctx.save_for_backward(q, k, v, keys, queries, places, starts, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, keys, queries, places, starts, out, lse = ctx.saved_tensors
        documents, scores, dropout = ctx.how
        wanted = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        found = []
        for heads in _parts(q, keys, queries, documents):
            q_h, k_h, v_h, K, Q, out_h, dout_h = _of_heads(heads, q, k, v, keys, queries, out, dout)
            made = _places(q_h, k_h, K, Q, places)
            pairs = [None if one is None else _pairs(q_h, documents) for one in (K, Q)]
            how = documents, None, scores, _drawn(dropout, heads), made, pairs
            dq, dk, dv = fused.backward(dout_h, q_h, k_h, v_h, out_h, lse[heads], *how)
            del made, how  # what they hold is as large as the pairs
            dK = _of_pairs(pairs, 0, dq, q_h, K, starts, documents, wanted[0])
            dQ = _of_pairs(pairs, 1, dk, k_h, Q, starts, documents, wanted[1])
            found.append((dq, dk, dv, dK, dQ))
        return *(_joined(list(parts), 1) for parts in zip(*found, strict=True)), None, None, None, None, None


def _parts(q, keys, queries, documents: Documents) -> Iterator[slice]:
    """Yield the heads that go at a time."""
    rows = max(len(one) for one in (keys, queries) if one is not None)
    count = max(1, _AT_ONCE // (len(q) * max(rows, documents.longest)))
    for first in range(0, q.shape[1], count):
        yield slice(first, min(q.shape[1], first + count))


def _of_heads(heads: slice, *tensors: torch.Tensor | None) -> list:
    """Return [..., h, D] of each [..., H, D]."""
    return [None if x is None else x[:, heads] for x in tensors]


def _drawn(dropout: ProbabilityDropout | None, heads: slice) -> ProbabilityDropout | None:
    return None if dropout is None else replace(dropout, sites=dropout.sites[heads])


def _places(q, k, K, Q, places: torch.Tensor) -> Places:
    """Return q . K and k . Q, [h, T, R]."""
    of_queries, of_keys = (
        None if rows is None else torch.bmm(x.transpose(0, 1), rows.permute(1, 2, 0)) for x, rows in ((q, K), (k, Q))
    )
    return Places(of_queries, of_keys, places)


def _pairs(q: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Return room for the gradients of pairs, [h, T, W]."""
    return torch.empty(q.shape[1], len(q), -(-documents.longest // 8) * 8, dtype=q.dtype, device=q.device)


def _of_pairs(pairs, side: int, dx, x, rows, starts, documents: Documents, wanted: bool) -> torch.Tensor | None:
    """Add to dx [T, h, D] what pairs[side] is of x through its product with rows [R, h, D]; return what it is of the
    rows, [R, h, D], where it is wanted. Give up pairs[side].
    """
    if rows is None:
        return None
    sums = _sums(pairs[side], side == 0, starts, documents)
    pairs[side] = None
    dx.transpose(0, 1).baddbmm_(sums, rows.transpose(0, 1))
    return torch.bmm(sums.transpose(1, 2), x.transpose(0, 1)).transpose(0, 1) if wanted else None


def _sums(pairs: torch.Tensor, before: bool, starts: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Return the sums [h, T, R] of pairs [h, T, W] by place; before: of keys before their queries."""
    from megalora.ops import place_kernels as kernels

    heads, total, width = pairs.shape
    count, (M, P, warps) = len(starts) - 1, _SUMMED
    sums = torch.empty(heads, total, count, dtype=pairs.dtype, device=pairs.device)
    with fused.on(pairs.device):
        kernels.place_kernel[-(-documents.longest // M), documents.count, heads](
            pairs, sums, starts, documents.bounds, documents.longest, total, width,
            BEFORE=before, EVEN=documents.bounds is None, PLACES=count, M=M, P=P, num_warps=warps,
        )  # fmt: skip
    return sums


def _joined(parts: list, dim: int) -> torch.Tensor | None:
    """Return the parts as one tensor; None where they are none."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, dim)
