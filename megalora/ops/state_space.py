"""The state space rule of Mamba-2 (Dao and Gu 2024, "Transformers are SSMs"), in chunks of CHUNK tokens.

A head has a state S [N, P], zero where its document begins. Each token makes of it
    S <- exp(g) S + b x^T;  o = S^T c
with g <= 0. Within a chunk, with G the sums of g up to each token and D_ij = exp(G_i - G_j), i >= j:
    o = exp(G) * (S^T c) + ((c b^T) * D) x
    S of the next chunk = exp(G_last) S + b^T (exp(G_last - G) * x)
Only the numbers of the second line go from chunk to chunk, for all documents and heads at once.

Legend: F tokens, J groups, each of which has b and c for R heads, H = J R heads, N and P features of a state; M chunks
of C tokens.
"""

from __future__ import annotations

import torch

from megalora.ops.delta_rule import CHUNK, Documents
from megalora.ops.placing import Placed


def state_space(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, g: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """Return the outputs o [F, H, P] of every token, all in float32 or float64.

    x [F, H, P]; b, c [F, J, N]; head h reads group h // R; g [F, H]
    """
    return _state_space(x, b, c, g, documents, None)[0]


def continued_state_space(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, g: torch.Tensor, documents: Documents, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (o as `state_space`, the states that the documents leave), as they begin with: [documents, J, N, R, P]."""
    o, left = _state_space(x, b, c, g, documents, states)
    assert left is not None
    return o, left


def state_space_step(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, g: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (o [B, H, P], the states behind it) of one token of each of B sequences with states [B, J, N, R, P]."""
    split = b.shape[1], x.shape[1] // b.shape[1]
    decay, x = g.exp().unflatten(1, split), x.unflatten(1, split)
    states = states * decay[:, :, None, :, None] + b[..., None, None] * x.unsqueeze(2)
    return torch.einsum("bjnrp,bjn->bjrp", states, c).flatten(1, 2), states


def _state_space(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    g: torch.Tensor,
    documents: Documents,
    states: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    split = b.shape[1], x.shape[1] // b.shape[1]

    def chunks(x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Map [F, heads, ...] to [M, C, heads, ...], zero where chunks are filled up and `hidden` says so."""
        return Placed.apply(x, documents.rows, documents.places, hidden, None).unflatten(0, (-1, CHUNK))

    # Tokens that fill a chunk up change no state: their x and g are zero.
    b, c = (chunks(x).transpose(1, 2) for x in (b, c))  # [M, J, C, N]
    x = chunks(x, documents.filling).unflatten(2, split).transpose(1, 2)  # [M, J, C, R, P]
    g = chunks(g, documents.filling).transpose(1, 2).unflatten(1, split)  # [M, J, R, C]
    seen = torch.ones(CHUNK, CHUNK, dtype=g.dtype, device=g.device).tril()
    # As products, and as sums from behind j up to i: see megalora.ops.delta_rule.
    decay = ((seen * g.unsqueeze(-2)) @ seen.tril(-1)).exp().tril()  # D [M, J, R, C, C]
    since, until = (g @ seen.mT).exp(), decay[..., -1, :]  # exp(G), exp(G_last - G) [M, J, R, C]
    scores = (c @ b.mT).unsqueeze(2) * decay
    within = scores @ x.transpose(2, 3)  # [M, J, R, C, P]
    moved = b.mT @ (x * until.mT.unsqueeze(-1)).flatten(3)  # [M, J, N, R P]
    moved, across = moved.unflatten(3, x.shape[3:]), since[..., -1]
    left = None
    if states is None:
        entering = _Scan.apply(moved, across, documents)
    else:
        order, last = list(documents.order), documents.last
        entering = _entering(moved, across, documents, states[order].to(moved.dtype))
        left = states.to(moved.dtype, copy=True)  # of documents of no tokens
        left[order] = moved[last] + entering[last] * across[last].unsqueeze(2).unsqueeze(-1)
    before = (c @ entering.flatten(3)).unflatten(3, x.shape[3:]) * since.mT.unsqueeze(-1)  # [M, J, C, R, P]
    o = (before + within.transpose(2, 3)).transpose(1, 2).flatten(0, 1)  # [M C, J, R, P]
    return Placed.apply(o, documents.places, documents.rows, None, documents.filling).flatten(1, 2), left


class _Scan(torch.autograd.Function):
    """The state that enters each chunk [M, J, N, R, P], zero where its document begins: that of the next one is
    decay S + moved, decay [M, J, R]."""

    @staticmethod
    def forward(ctx, moved, decay, documents):
        entering = _entering(moved, decay, documents, None)
        ctx.documents = documents
        ctx.save_for_backward(decay, entering)
        return entering

    @staticmethod
    def backward(ctx, grad):
        decay, entering = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        leaving = torch.zeros_like(grad)  # the gradient of the state that a chunk leaves
        factor = decay[:, :, None, :, None]
        for before, own in reversed(ctx.documents.depths):
            leaving[before] = grad[own]
            grad[before] += grad[own] * factor[before]
        return leaving, (leaving * entering).sum((2, 4)), None


def _entering(
    moved: torch.Tensor, decay: torch.Tensor, documents: Documents, states: torch.Tensor | None
) -> torch.Tensor:
    """Return the state that enters each chunk; states [documents, J, N, R, P]: of the first ones, None: zero."""
    entering = torch.empty_like(moved, memory_format=torch.contiguous_format)
    first = entering[: documents.counts[0]]
    first.zero_() if states is None else first.copy_(states)
    factor = decay[:, :, None, :, None]
    for before, own in documents.depths:
        torch.addcmul(moved[before], entering[before], factor[before], out=entering[own])
    return entering
