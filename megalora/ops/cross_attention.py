"""Attention of a decoder's tokens to the source of their document: each document's queries see all of its keys.

Legend: T queries and S keys of a microbatch, H heads, D head_dim, n and m of one document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from megalora.ops.attention import packs
from megalora.ops.fused_attention import Documents, fused_attention, fuses
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.ops.tiled_attention import Run, Scores, TiledDocuments


@dataclass(frozen=True)
class Crossing:
    """Which keys each document's queries see: cumulative bounds of both, as ints, of as many documents.

    A document without keys has zeros as its result. on_device: both as int32, for kernels that read them there
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    on_device: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(
        cls, queries: tuple[int, ...], keys: tuple[int, ...], head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Crossing:
        """Build for attention with such heads on the device."""
        assert len(queries) == len(keys)
        if not packs(head_dim, dtype, device):
            return cls(queries, keys)
        moved = [torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True) for bounds in (queries, keys)]
        return cls(queries, keys, (moved[0], moved[1]))

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each document."""
        queries, keys = (
            [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)] for bounds in (self.queries, self.keys)
        )
        return queries, keys


def cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    crossing: Crossing,
    scale: float,
    dropout: ProbabilityDropout | None = None,
) -> torch.Tensor:
    """Return the softmax attention [T, H, D] of q [T, H, D] over k, v [S, H, D] of each document.

    scale  what scores are multiplied by; dropout: of the probabilities
    """
    if dropout is not None and crossing.on_device is not None and fuses(q.shape[2], q.dtype, q.device):
        (bounds, key_bounds), (queries, keys) = crossing.on_device, crossing.lengths
        documents = Documents(len(queries), max(queries), bounds, key_bounds, max(keys))
        return fused_attention(q, k, v, documents, None, Scores(scale, causal=False), dropout)
    if dropout is not None:
        return _Tiled.apply(q, k, v, crossing, Scores(scale, causal=False), dropout)
    queries, keys = crossing.lengths
    if crossing.on_device is not None and packs(q.shape[2], q.dtype, q.device):
        flash = torch.ops.aten._flash_attention_forward
        return flash(q, k, v, *crossing.on_device, max(queries), max(keys), 0.0, False, False, scale=scale)[0]
    parts = []
    for q_n, k_m, v_m in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        if len(q_n) and len(k_m):
            q_1, k_1, v_1 = (x.transpose(0, 1).unsqueeze(0) for x in (q_n, k_m, v_m))
            parts.append(scaled_dot_product_attention(q_1, k_1, v_1, scale=scale).squeeze(0).transpose(0, 1))
        else:
            parts.append(torch.zeros_like(q_n))
    return torch.cat(parts)


class _Tiled(torch.autograd.Function):
    """In tiles of plain torch, document by document (see megalora.ops.tiled_attention)."""

    @staticmethod
    def forward(ctx, q, k, v, crossing, scores, dropout):
        out, sums = torch.zeros_like(q), []
        for rows, seen in _documents(crossing):
            document = TiledDocuments(q[rows], k[seen], v[seen], _run(rows), None, scores, dropout.of(rows, seen))
            out[rows], lse = document.forward()
            sums.append(lse)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.crossing, ctx.scores, ctx.dropout = crossing, scores, dropout
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, *sums = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for (rows, seen), lse in zip(_documents(ctx.crossing), sums, strict=True):
            drawn = ctx.dropout.of(rows, seen)
            document = TiledDocuments(q[rows], k[seen], v[seen], _run(rows), None, ctx.scores, drawn)
            dq[rows], dk[seen], dv[seen] = document.backward(out[rows], lse, dout[rows])
        return dq, dk, dv, None, None, None


def _documents(crossing: Crossing) -> list[tuple[slice, slice]]:
    """Return the queries and keys of each document that has both."""
    bounds = zip(crossing.queries[:-1], crossing.queries[1:], crossing.keys[:-1], crossing.keys[1:], strict=True)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in bounds if a < b and c < d]


def _run(rows: slice) -> Run:
    return Run(0, 1, rows.stop - rows.start)
