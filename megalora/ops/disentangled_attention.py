"""DeBERTa's attention (He et al. 2021): a score is scale * (q . k + q . K[r] + k . Q[r]), r the row of query - key.

By kernels on a GPU in 16 bits (megalora.ops.fused_disentangled), else in tiles of plain torch, as
megalora.ops.tiled_attention, whose legend holds here too; R rows of K and Q.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megalora.ops.attention import Packed, documents_of
from megalora.ops.fused_attention import fuses
from megalora.ops.fused_disentangled import fused_disentangled
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.ops.tiled_attention import Run, Scores, Tile, TiledDocuments, runs_of

_AT_ONCE = {"cuda": 1 << 26, "cpu": 1 << 22}  # products of tokens and rows


@dataclass(frozen=True, eq=False)
class Positions:
    """What scores know of positions.

    keys, queries  K and Q [R, H, D] of this rank's heads; None: there is no such term
    rows           [2 L + 1] int32, the row of query - key = -L .. L, none less than the one before; beyond L as at L
    starts         [R + 1] int32, where each row begins (megalora.ops.fused_disentangled.starts_of)
    """

    keys: torch.Tensor | None
    queries: torch.Tensor | None
    rows: torch.Tensor
    starts: torch.Tensor

    def at(self, behind: torch.Tensor) -> torch.Tensor:
        """Return the rows of query - key = `behind`."""
        longest = self.rows.shape[0] // 2
        return self.rows[behind.clamp(-longest, longest) + longest].long()


def disentangled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: Positions,
    bounds: Sequence[int],
    scores: Scores,
    dropout: ProbabilityDropout | None = None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """Return the attention [T, H, D] of q, k, v [T, H, D], in which a token sees its whole document.

    bounds  cumulative bounds of the documents in T; scores: the scale; dropout: of the probabilities
    packed  the same bounds on the device, for the kernels
    """
    assert not scores.causal and scores.simple
    given = positions.keys, positions.queries, positions.rows, positions.starts
    if fuses(q.shape[2], q.dtype, q.device):
        return fused_disentangled(q, k, v, *given, documents_of(bounds, packed, q.device), scores, dropout)
    return _DisentangledAttention.apply(q, k, v, *given, tuple(bounds), scores, dropout)


class _Documents(TiledDocuments):
    """The documents of one run, [C H, 1, N, D], and what positions add to their scores.

    of_keys  k . Q of all rows [C H, N, R]: every tile of queries reads some
    """

    def __init__(self, q, k, v, positions: Positions, run: Run, scores: Scores, dropout: ProbabilityDropout | None):
        super().__init__(q, k, v, run, None, scores, dropout)
        self.positions = positions
        self.K, self.Q = (None if x is None else x.transpose(0, 1) for x in (positions.keys, positions.queries))
        self.of_keys = None if self.Q is None else self._times(self.k, self.Q.transpose(1, 2))

    def weights(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
        s, _ = super().weights(tile)
        rows = self._rows(tile)
        if self.K is not None:
            of_queries = self._times(self.q[:, 0, tile.first : tile.stop], self.K.transpose(1, 2))
            s[:, 0].add_(of_queries.gather(2, rows.expand(s.shape[0], -1, -1)), alpha=self.scale)
        if self.of_keys is not None:
            of_keys = self.of_keys.gather(2, rows.t().expand(s.shape[0], -1, -1))
            s[:, 0].add_(of_keys.transpose(1, 2), alpha=self.scale)
        return s, None

    def gradients(self, out, lse, dout) -> tuple[torch.Tensor | None, ...]:
        """Return (dq, dk, dv [C N, H, D], dK, dQ [R, H, D] in at least float32): as of `backward`."""
        self._dK = None if self.K is None else self.K.new_zeros(self.K.shape, dtype=self.wide)
        self._dof_keys = None if self.of_keys is None else torch.zeros_like(self.of_keys)
        dq, dk, dv = self.backward(out, lse, dout)
        if self._dof_keys is None:
            return dq, dk, dv, self._dK, None
        dk = dk + self.by_token(self._times(self._dof_keys, self.Q).unsqueeze(1)).to(dk.dtype)
        return dq, dk, dv, self._dK, self._summed(self._dof_keys, self.k)

    def also(self, ds: torch.Tensor, tile: Tile) -> torch.Tensor | None:
        """Add up what ds [C H, n, m] is of K and Q; return what it is of the tile's queries."""
        rows, ds = self._rows(tile), ds.to(self.wide)
        if self._dof_keys is not None:
            self._dof_keys.scatter_add_(2, rows.t().expand(ds.shape[0], -1, -1), ds.transpose(1, 2))
        if self.K is None:
            return None
        of_queries = ds.new_zeros(*ds.shape[:2], self.K.shape[1]).scatter_add_(2, rows.expand_as(ds), ds)
        self._dK += self._summed(of_queries, self.q[:, 0, tile.first : tile.stop])
        return self._times(of_queries, self.K)

    def _rows(self, tile: Tile) -> torch.Tensor:
        """Return the rows [n, m] of the tile's pairs."""
        device = self.q.device
        query = torch.arange(tile.first, tile.stop, device=device)[:, None]
        return self.positions.at(query - torch.arange(tile.low, tile.high, device=device))

    def _times(self, x: torch.Tensor, of_heads: torch.Tensor) -> torch.Tensor:
        """Return x [C H, n, i] times of_heads [H, i, j], [C H, n, j] in at least float32."""
        return self.product(x, of_heads.repeat(self.run.count, 1, 1))

    def _summed(self, a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over documents of a [C H, n, R] transposed times x [C H, n, D], [H, R, D]."""
        total = self.product(a.transpose(1, 2), x.to(a.dtype))
        return total.unflatten(0, (self.run.count, -1)).sum(0)


class _DisentangledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, keys, queries, rows, starts, bounds, scores, dropout):
        positions, results = Positions(keys, queries, rows, starts), []
        size = 1 if keys is None and queries is None else (keys if keys is not None else queries).shape[0]
        ctx.runs = tuple(_parts(bounds, q, size))
        for run, at, part in _each(ctx.runs, dropout):
            results.append(_Documents(q[at], k[at], v[at], positions, run, scores, part).forward())
        out = torch.cat([out for out, _ in results])
        ctx.save_for_backward(q, k, v, keys, queries, rows, starts, out, *(lse for _, lse in results))
        ctx.scores, ctx.dropout = scores, dropout
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, keys, queries, rows, starts, out, *lse = ctx.saved_tensors
        positions, parts = Positions(keys, queries, rows, starts), []
        for (run, at, part), sums in zip(_each(ctx.runs, ctx.dropout), lse, strict=True):
            documents = _Documents(q[at], k[at], v[at], positions, run, ctx.scores, part)
            parts.append(documents.gradients(out[at], sums, dout[at]))
        dq, dk, dv = (torch.cat([part[i] for part in parts]) for i in range(3))
        found = [
            None if x is None else sum(part[i] for part in parts).transpose(0, 1).to(x.dtype)  # type: ignore[union-attr]
            for i, x in ((3, keys), (4, queries))
        ]
        return dq, dk, dv, *found, None, None, None, None, None


def _parts(bounds: Sequence[int], q: torch.Tensor, size: int) -> Iterator[Run]:
    """Yield the runs of documents of one length, cut so that the products with `size` rows are not too large."""
    most = _AT_ONCE.get(q.device.type, _AT_ONCE["cpu"])
    for run in runs_of(bounds):
        count = max(1, most // (q.shape[1] * run.length * max(size, run.length)))
        for first in range(0, run.count, count):
            yield Run(run.start + first * run.length, min(count, run.count - first), run.length)


def _each(
    runs: Sequence[Run], dropout: ProbabilityDropout | None
) -> Iterator[tuple[Run, slice, ProbabilityDropout | None]]:
    """Yield each run, its tokens and their dropout."""
    for run in runs:
        at = slice(run.start, run.start + run.count * run.length)
        yield run, at, None if dropout is None else dropout.of(at)
