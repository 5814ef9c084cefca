"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks"), in chunks of CHUNK tokens.

A head has a state S [K, V], zero where its document begins. Each token makes of it
    S <- exp(g) S;  S <- S + beta k (v - S^T k)^T;  o = S^T q
with g <= 0 and 0 <= beta <= 1. Within a chunk, with G the sums of g up to each token and D_ij = exp(G_i - G_j), i >= j:
    T = (1 + the part of diag(beta) (k k^T * D) below its diagonal)^-1
    U = T diag(beta) v,  W = T diag(beta exp(G)) k
    o = (q * exp(G)) S + ((q k^T) * D) (U - W S)
    S of the next chunk = exp(G_last) S + (k * exp(G_last - G))^T (U - W S) = M S + B
M and B need no state, so that from chunk to chunk there is one product, of all documents and heads at once; the rest is
batched over the chunks.

Legend: F tokens, J key heads, each of which R value heads read, H = J R, K and V features of a key and a value; N
chunks of C tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalora.batch import to_device
from megalora.ops.placing import Placed

CHUNK = 64
EPSILON = 1e-6  # of the norms of q and k


@dataclass(frozen=True)
class Documents:
    """Documents of F tokens, each cut into chunks of CHUNK of its own, the last one filled up.

    Chunks lie by depth: the first of every document, those of the longest in front, then the second of each that has
    one, and so on. So the chunks of one depth continue the first ones of the depth before, in order.

    ages    [F] int64, each token's place in its document
    rows    [N C] int64, the token in each place of a chunk; any one where `filling`
    places  [F] int64, where each token is in `rows`
    filling  [N C] bool
    counts  chunks of each depth
    order   of the documents, as their chunks lie
    pieces  [N, 2] int32, the tokens of each chunk, from where to before where, document by document: the kernels' order
    spans   [documents, 3] int32, the same of those with tokens, in `order`, and their first piece
    """

    ages: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    filling: torch.Tensor
    counts: tuple[int, ...]
    order: tuple[int, ...]
    pieces: torch.Tensor
    spans: torch.Tensor

    @classmethod
    def of(cls, bounds: Sequence[int], device: torch.device | str = "cpu") -> Documents:
        """Build for documents with these cumulative bounds in F; those of no tokens are passed over."""
        spans = [(start, stop) for start, stop in itertools.pairwise(bounds)]
        chunks = [-(-(stop - start) // CHUNK) for start, stop in spans]
        order = sorted((i for i, count in enumerate(chunks) if count), key=lambda i: -chunks[i])
        counts = [sum(chunks[i] > depth for i in order) for depth in range(max(chunks, default=0))]
        offsets = torch.tensor([0, *itertools.accumulate(counts)])
        ages = torch.cat([torch.arange(stop - start) for start, stop in spans])
        rank = torch.zeros(len(spans), dtype=torch.int64)
        rank[list(order)] = torch.arange(len(order))
        of_tokens = rank.repeat_interleave(torch.tensor([stop - start for start, stop in spans]))
        places = (offsets[ages // CHUNK] + of_tokens) * CHUNK + ages % CHUNK
        rows = torch.zeros(sum(counts) * CHUNK, dtype=torch.int64)
        filling = torch.ones(len(rows), dtype=torch.bool)
        rows[places], filling[places] = torch.arange(len(places)), False
        firsts = list(itertools.accumulate(chunks, initial=0))
        pieces = [(i, min(i + CHUNK, stop)) for start, stop in spans for i in range(start, stop, CHUNK)]
        made = [torch.tensor(x, dtype=torch.int32).view(len(x), -1) for x in (
            pieces, [(*spans[i], firsts[i]) for i in order]
        )]  # fmt: skip
        ages, rows, places, filling, of_pieces, of_spans = (
            to_device(x, device) for x in (ages, rows, places, filling, *made)
        )
        return cls(ages, rows, places, filling, tuple(counts), tuple(order), of_pieces, of_spans)

    def alike(self, most: int) -> Documents:
        """Return a copy of what kernels read, in which `put` has room for any documents of as many tokens, at most
        `most` of them: for a CUDA graph. What plain torch reads is left out."""
        tokens, none = len(self.ages), self.rows[:0]
        # n tokens are at most (n + CHUNK - 1) / CHUNK chunks.
        pieces = self.pieces.new_empty((tokens + most * (CHUNK - 1)) // CHUNK, 2)
        spans = self.spans.new_empty(most, 3)
        room = Documents(torch.empty_like(self.ages), none, none, self.filling[:0], (), (), pieces, spans)
        room.put(self)
        return room

    def put(self, other: Documents) -> None:
        """Take what kernels read of `other`, documents of as many tokens, in place; behind them chunks and documents
        are empty, at the end of the tokens."""
        self.ages.copy_(other.ages)
        for room, own in ((self.pieces, other.pieces), (self.spans, other.spans)):
            room.fill_(len(self.ages))
            room[: len(own)].copy_(own)

    @property
    def depths(self) -> list[tuple[slice, slice]]:
        """For each depth from 1 on: (the chunks before, the chunks of it)."""
        starts = list(itertools.accumulate(self.counts, initial=0))
        pairs = zip(itertools.pairwise(starts), self.counts[1:], strict=False)
        return [(slice(before, before + n), slice(start, start + n)) for (before, start), n in pairs]

    @property
    def last(self) -> list[int]:
        """The last chunk of each document, in `order`."""
        starts = list(itertools.accumulate(self.counts, initial=0))
        deepest = (sum(count > i for count in self.counts) - 1 for i in range(len(self.order)))
        return [starts[depth] + i for i, depth in enumerate(deepest)]


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    documents: Documents,
) -> torch.Tensor:
    """Return the outputs o [F, H, V] of every token, in float32 or float64.

    q, k  [F, J, K], here scaled to length 1, and q by K^-0.5
    v     [F, H, V]; value head h reads key head h // R
    g, beta  [F, H] float32 or float64
    """
    return _delta_rule(q, k, v, g, beta, documents, None)[0]


def continued_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    documents: Documents,
    states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (o as `delta_rule`, the states that the documents leave [documents, H, K, V]).

    states  [documents, H, K, V] float32 or float64, that they begin with
    """
    o, left = _delta_rule(q, k, v, g, beta, documents, states)
    assert left is not None
    return o, left


def delta_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (o [B, H, V], the states [B, H, K, V] behind it) of one token of each of B sequences, as `delta_rule`."""
    wide, repeats = states.dtype, v.shape[1] // k.shape[1]
    q, k = (_normed(x.to(wide)).repeat_interleave(repeats, 1) for x in (q, k))
    states = states * g.to(wide).exp()[..., None, None]
    missing = (v.to(wide) - torch.einsum("bhkv,bhk->bhv", states, k)) * beta.to(wide).unsqueeze(-1)
    states = states + k.unsqueeze(-1) * missing.unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", states, q * q.shape[-1] ** -0.5), states


def _normed(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return x scaled to length `scale`."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (torch.rsqrt(length * length + EPSILON) * scale)


def _delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    documents: Documents,
    states: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Legend: what is [N, H, ...] of value heads is [N, J, R, ...] beside what is of key heads.

    The fewer tensors the better: on a GPU they are what takes time.
    """
    wide, split = g.dtype, (k.shape[1], v.shape[1] // k.shape[1])

    def chunks(x: torch.Tensor) -> torch.Tensor:
        """Map [F, heads, n] to [N, heads, C, n] in the wide dtype."""
        x = Placed.apply(x, documents.rows, documents.places, None, None)
        return x.unflatten(0, (-1, CHUNK)).transpose(1, 2).to(wide, memory_format=torch.contiguous_format)

    def of_heads(x: torch.Tensor) -> torch.Tensor:
        """Map [F, H] to [N, H, C], zero where chunks are filled up: such tokens change no state."""
        x = Placed.apply(x, documents.rows, documents.places, documents.filling, None)
        return x.unflatten(0, (-1, CHUNK)).transpose(1, 2)

    q, k, v = _normed(chunks(q), q.shape[-1] ** -0.5), _normed(chunks(k)), chunks(v)
    seen = torch.ones(CHUNK, CHUNK, dtype=wide, device=q.device).tril()
    beta, g = of_heads(beta), of_heads(g)
    # Sums of g from behind j up to i: differences of sums from the chunk's start would lose what strong decays leave.
    # As products: cumsum has no fixed order on a GPU.
    decay = ((seen * g.unsqueeze(-2)) @ seen.tril(-1)).exp().tril()  # D [N, H, C, C]
    since, until = (g @ seen.mT).exp(), decay[..., -1, :]  # exp(G), exp(G_last - G) [N, H, C]
    by_keys = decay.unflatten(1, split)
    alike = (k @ k.mT).unsqueeze(2) * by_keys
    inverse = _UnitInverse.apply(alike.flatten(1, 2) * beta.unsqueeze(-1))
    changes = inverse * beta.unsqueeze(-2)  # T diag(beta)
    values = changes @ v  # U
    # -W: its keys are those of all value heads that read one.
    reads = (changes * -since.unsqueeze(-2)).unflatten(1, split).flatten(2, 3) @ k
    reads = reads.unflatten(2, (split[1], CHUNK)).flatten(1, 2)
    keys = (k.unsqueeze(2) * until.unflatten(1, split).unsqueeze(-1)).flatten(1, 2)
    left = None
    if states is None:
        entering = _Scan.apply(keys, values, reads, since[..., -1], documents)
    else:
        order, last = list(documents.order), documents.last
        moved, matrix = _transitions(keys, values, reads, since[..., -1])
        entering = _entering(moved, matrix, documents, states[order].to(wide))
        left = states.to(wide, copy=True)  # of documents of no tokens
        left[order] = moved[last] + matrix[last] @ entering[last]
    values = _added(values, reads, entering)
    o = (q.unsqueeze(2) * since.unflatten(1, split).unsqueeze(-1)).flatten(1, 2) @ entering
    o = _added(o, ((q @ k.mT).unsqueeze(2) * by_keys).flatten(1, 2), values)
    return _by_token(o, documents), left


def _added(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return x + a @ b, each [N, H, ...]."""
    return torch.baddbmm(x.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, x.shape[:2])


def _by_token(o: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Return o [N, H, C, V] as [F, H, V]."""
    count, device = o.shape[1], o.device
    heads = torch.arange(count, device=device)
    chunk, place = documents.places // CHUNK, documents.places % CHUNK
    there = (((chunk * count).unsqueeze(1) + heads) * CHUNK + place.unsqueeze(1)).flatten()
    back = (documents.rows.view(-1, 1, CHUNK) * count + heads.unsqueeze(1)).flatten()
    idle = documents.filling.view(-1, 1, CHUNK).expand(-1, count, -1).reshape(-1)
    return Placed.apply(o.flatten(0, 2), there, back, None, idle).unflatten(0, (-1, count))


class _UnitInverse(torch.autograd.Function):
    """The inverse of a lower triangular matrix [..., C, C] with ones on its diagonal, of which what is below counts."""

    @staticmethod
    def forward(ctx, lower):
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, one, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grad @ inverse.mT).tril_(-1).neg_()


class _Scan(torch.autograd.Function):
    """The state that enters each chunk [N, H, K, V], zero where its document begins.

    keys [N, H, C, K], values U, reads -W, decay [N, H] of the whole chunk: the state of the next one is
    decay S + keys^T (U - W S)
    """

    @staticmethod
    def forward(ctx, keys, values, reads, decay, documents):
        moved, matrix = _transitions(keys, values, reads, decay)
        entering = _entering(moved, matrix, documents, None)
        ctx.documents = documents
        ctx.save_for_backward(keys, values, reads, matrix, entering)
        return entering

    @staticmethod
    def backward(ctx, grad):
        keys, values, reads, matrix, entering = ctx.saved_tensors
        documents, grad = ctx.documents, grad.clone(memory_format=torch.contiguous_format)
        leaving = torch.zeros_like(grad)  # the gradient of the state that a chunk leaves
        for before, own in reversed(documents.depths):
            leaving[before] = grad[own]
            behind, onto = grad[own].flatten(0, 1), grad[before].flatten(0, 1)
            torch.baddbmm(onto, matrix[before].flatten(0, 1).mT, behind, out=onto)
        d_matrix = leaving @ entering.mT
        d_decay = d_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        d_keys = _added(values @ leaving.mT, reads, d_matrix.mT)
        return d_keys, keys @ leaving, keys @ d_matrix, d_decay, None


def _transitions(
    keys: torch.Tensor, values: torch.Tensor, reads: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B [N, H, K, V], M [N, H, K, K]): the state of the next chunk is M S + B."""
    matrix = keys.mT @ reads
    matrix.diagonal(dim1=-2, dim2=-1).add_(decay.unsqueeze(-1))
    return keys.mT @ values, matrix


def _entering(
    moved: torch.Tensor, matrix: torch.Tensor, documents: Documents, states: torch.Tensor | None
) -> torch.Tensor:
    """Return the state that enters each chunk; states [documents, H, K, V]: of the first ones, None: zero."""
    entering = torch.empty_like(moved)
    first = entering[: documents.counts[0]]
    first.zero_() if states is None else first.copy_(states)
    for before, own in documents.depths:
        of_chunks = (x[before].flatten(0, 1) for x in (moved, matrix, entering))
        torch.baddbmm(*of_chunks, out=entering[own].flatten(0, 1))
    return entering
