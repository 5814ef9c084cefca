"""Attention in plain torch, a tile of queries at a time: right for every kind of scores, forward and backward, in
bounded memory. It serves where no kernel does: softcap, ALiBi and sinks on a GPU, encoders and float16 on a CPU.

Legend: C documents of one length, K key/value heads, G query heads that read one of them, N queries and S keys of a
document (N < S over a cache: query n stands at S - N + n), n queries of a tile, m keys that it reads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megalora.ops.probability_dropout import ProbabilityDropout

_TILE = {"cuda": 1 << 26, "cpu": 1 << 22}  # scores at a time


@dataclass(frozen=True, eq=False)
class Scores:
    """What becomes of q k^T before the softmax.

    scale    what it is multiplied by; None: 1 / sqrt(D)
    softcap  a scaled score s becomes softcap * tanh(s / softcap); None: s
    slopes   [H] in at least float32, of this rank's query heads: -slope * |query - key| is added (ALiBi); None: nothing
    causal   a token sees none behind it
    offsets  [H, 2 L + 1] in at least float32: offsets[h, L + key - query] is added, beyond L as at L (T5); or None
    sinks    [H] in at least float32, of this rank's query heads: scores that take part in the softmax and give nothing
    """

    scale: float | None = None
    softcap: float | None = None
    slopes: torch.Tensor | None = None
    causal: bool = True
    offsets: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    @property
    def simple(self) -> bool:
        """Whether torch's own kernels compute them, forward and backward."""
        return self.softcap is None and self.slopes is None and self.offsets is None and self.sinks is None

    def bias(self, behind: torch.Tensor) -> torch.Tensor:
        """Return `offsets` [H, ...] where query - key is `behind` [...]."""
        assert self.offsets is not None
        longest = self.offsets.shape[1] // 2
        return self.offsets[:, longest - behind.clamp(-longest, longest)]


PLAIN = Scores()


class Run(NamedTuple):
    """Neighbouring documents of one length: from token `start` on, `count` of `length` tokens."""

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count(), which nobody calls
    length: int


def runs_of(bounds: Sequence[int]) -> list[Run]:
    """Return each run of neighbouring documents of one length."""
    runs: list[Run] = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        length = stop - start
        if runs and runs[-1].length == length:
            runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
        else:
            runs.append(Run(start, 1, length))
    return runs


def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    runs: Sequence[Run],
    window: int | None,
    scores: Scores,
    dropout: ProbabilityDropout | None = None,
) -> torch.Tensor:
    """Return the attention [T, H, D] of q [T, H, D] over k, v [T, K, D], each document of `runs` by itself."""
    return _TiledAttention.apply(q, k, v, tuple(runs), window, scores, dropout)


def tiled_cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scores: Scores
) -> torch.Tensor:
    """Return the attention [N, H, D] of the last N tokens of a sequence, q [N, H, D], over all: k, v [S, K, D]."""
    return TiledDocuments(q, k, v, Run(0, 1, len(q)), window, scores).forward()[0]


class Tile(NamedTuple):
    """Queries [first, stop) and the keys [low, high) that they read; seen [n, m]: which of these each query sees."""

    first: int
    stop: int
    low: int
    high: int
    seen: torch.Tensor | None
    behind: torch.Tensor | None  # [n, m] query - key, where slopes or offsets want it


class TiledDocuments:
    """The documents of one run, by key/value heads: q [C K, G, N, D], k, v [C K, S, D]."""

    def __init__(
        self, q, k, v, run: Run, window: int | None, scores: Scores, dropout: ProbabilityDropout | None = None
    ):
        self.run, self.window, self.scores, self.dropout = run, window, scores, dropout
        self.kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.keys = self.by_head(q), len(k) // run.count if len(q) == len(k) else len(k)
        self.k, self.v = (x.unflatten(0, (run.count, -1)).transpose(1, 2).flatten(0, 1) for x in (k, v))
        self.scale = q.shape[2] ** -0.5 if scores.scale is None else scores.scale

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """Map [C N, H, D] to [C K, G, N, D]."""
        x = x.unflatten(0, (self.run.count, self.run.length)).transpose(1, 2)
        return x.unflatten(1, (self.kv_heads, self.group)).flatten(0, 1)

    def by_token(self, x: torch.Tensor) -> torch.Tensor:
        """Map [C K, G, N, D] to [C N, H, D]."""
        x = x.unflatten(0, (self.run.count, self.kv_heads)).flatten(1, 2)
        return x.transpose(1, 2).flatten(0, 1)

    def tiles(self) -> Iterator[Tile]:
        length, keys, device = self.run.length, self.keys, self.q.device
        most = _TILE.get(device.type, _TILE["cpu"]) // max(1, self.q.shape[0] * self.group * keys)
        step, ahead = max(16, most), keys - length
        for first in range(0, length, step):
            stop = min(length, first + step)
            low = 0 if self.window is None else max(0, first + ahead - self.window + 1)
            high = keys if self.window is None else min(keys, stop + ahead + self.window - 1)
            high = min(high, stop + ahead) if self.scores.causal else high
            query = torch.arange(first + ahead, stop + ahead, device=device)[:, None]
            behind = query - torch.arange(low, high, device=device)
            seen = behind >= 0 if self.scores.causal else None
            if self.window is not None:
                near = behind.abs() < self.window
                seen = near if seen is None else seen & near
            plain = self.scores.slopes is None and self.scores.offsets is None
            yield Tile(first, stop, low, high, seen, None if plain else behind)

    def weights(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (scores, not seen: -inf, [C K, G, n, m], what softcap's tanh gave there)."""
        q = self.q[:, :, tile.first : tile.stop]
        s = self.product(q.flatten(1, 2), self.k[:, tile.low : tile.high].transpose(1, 2)).mul_(self.scale)
        s, tanh, softcap = s.unflatten(1, (self.group, -1)), None, self.scores.softcap
        if softcap is not None:
            tanh = s.div_(softcap).tanh_()
            s = tanh * softcap
        if self.scores.slopes is not None:
            slopes = self.scores.slopes.view(1, self.kv_heads, self.group).expand(self.run.count, -1, -1)
            s = s - slopes.reshape(-1, self.group, 1, 1) * tile.behind.abs()
        if self.scores.offsets is not None:
            bias = self.scores.bias(tile.behind).unflatten(0, (self.kv_heads, self.group))
            s = (s.unflatten(0, (self.run.count, -1)) + bias).flatten(0, 1)
        if tile.seen is not None:
            s.masked_fill_(~tile.seen, float("-inf"))
        return s, tanh

    def dropped(self, p: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Return p [C K, G, n, m], the probabilities or their gradient, where it is kept, and 0 elsewhere."""
        if self.dropout is None:
            return p
        keep = self.dropout.keep(self.run.count, slice(tile.first, tile.stop), slice(tile.low, tile.high))
        keep = keep.unflatten(1, (self.kv_heads, self.group)).flatten(0, 1)
        return torch.where(keep, p * self.dropout.scale, 0.0)

    def also(self, ds: torch.Tensor, tile: Tile) -> torch.Tensor | None:
        """Do what else is to be done with the gradient of the scores [C K, G n, m] before the scale; return what is to
        be added to dq [C K, n, D] of the tile, where there is one query head to a key, or None."""
        return None

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a [B, n, i] b [B, i, m] in at least float32."""
        if a.device.type == "cuda" and a.dtype != self.wide:
            return torch.bmm(a, b, out_dtype=self.wide)
        return torch.bmm(a.to(self.wide), b.to(self.wide))

    def total(self, s: torch.Tensor) -> torch.Tensor:
        """Return the logsumexp [C K, G, n] of the scores [C K, G, n, m] and the sinks: with it in place of that of the
        scores alone, the probabilities and their backward pass are those with sinks."""
        total, sinks = s.logsumexp(-1), self.scores.sinks
        if sinks is None:
            return total
        each = sinks.view(1, self.kv_heads, self.group).expand(self.run.count, -1, -1).reshape(-1, self.group, 1)
        return torch.logaddexp(total, each.to(total.dtype))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (attention [C N, H, D], logsumexp of the scores [C K, G, N])."""
        out = torch.empty_like(self.q)
        lse = torch.empty(self.q.shape[:3], dtype=self.wide, device=self.q.device)
        for tile in self.tiles():
            s, _ = self.weights(tile)
            lse[:, :, tile.first : tile.stop] = total = self.total(s)
            p = self.dropped(s.sub_(total.unsqueeze(-1)).exp_(), tile).to(self.q.dtype)
            part = self.product(p.flatten(1, 2), self.v[:, tile.low : tile.high])
            out[:, :, tile.first : tile.stop] = part.unflatten(1, (self.group, -1))
        return self.by_token(out), lse

    def backward(self, out, lse, dout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (dq [C N, H, D], dk, dv [C S, K, D]): ds = p (dout v^T - rowsum(dout out)) x softcap's slope."""
        out, dout = self.by_head(out), self.by_head(dout)
        mean = (dout.to(self.wide) * out).sum(-1, keepdim=True)
        dq = torch.empty(self.q.shape, dtype=self.wide, device=self.q.device)
        dk, dv = (torch.zeros(self.k.shape, dtype=self.wide, device=self.q.device) for _ in "kv")
        for tile in self.tiles():
            rows, keys = slice(tile.first, tile.stop), slice(tile.low, tile.high)
            s, tanh = self.weights(tile)
            p = s.sub_(lse[:, :, rows].unsqueeze(-1)).exp_()
            d = dout[:, :, rows].flatten(1, 2)
            ds = self.product(d, self.v[:, keys].transpose(1, 2)).unflatten(1, (self.group, -1))
            ds = self.dropped(ds, tile).sub_(mean[:, :, rows]).mul_(p)
            p = self.dropped(p, tile)
            if tanh is not None:
                ds.mul_(tanh.square_().neg_().add_(1))
            ds, p = (x.to(self.q.dtype).flatten(1, 2) for x in (ds.mul_(self.scale), p))
            dq[:, :, rows] = self.product(ds, self.k[:, keys]).unflatten(1, (self.group, -1))
            more = self.also(ds, tile)
            if more is not None:
                dq[:, 0, rows] += more
            dk[:, keys] += self.product(ds.transpose(1, 2), self.q[:, :, rows].flatten(1, 2))
            dv[:, keys] += self.product(p.transpose(1, 2), d)
        dk, dv = (x.unflatten(0, (self.run.count, -1)).transpose(1, 2).flatten(0, 1) for x in (dk, dv))
        return self.by_token(dq).to(self.q.dtype), dk.to(self.q.dtype), dv.to(self.q.dtype)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, runs, window, scores, dropout):
        results = []
        for run in runs:
            at = slice(run.start, run.start + run.count * run.length)
            part = None if dropout is None else dropout.of(at)
            results.append(TiledDocuments(q[at], k[at], v[at], run, window, scores, part).forward())
        out = torch.cat([out for out, _ in results])
        ctx.save_for_backward(q, k, v, out, *(lse for _, lse in results))
        ctx.runs, ctx.window, ctx.scores, ctx.dropout = runs, window, scores, dropout
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, *lse = ctx.saved_tensors
        parts = []
        for run, sums in zip(ctx.runs, lse, strict=True):
            at = slice(run.start, run.start + run.count * run.length)
            part = None if ctx.dropout is None else ctx.dropout.of(at)
            documents = TiledDocuments(q[at], k[at], v[at], run, ctx.window, ctx.scores, part)
            parts.append(documents.backward(out[at], sums, dout[at]))
        dq, dk, dv = (torch.cat(one) for one in zip(*parts, strict=True))
        return dq, dk, dv, None, None, None, None
