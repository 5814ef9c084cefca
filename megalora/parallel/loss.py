"""Cross entropy of the head's logits, with the vocabulary cut over tp and only labelled tokens computed.

The logits of a chunk exist only while the chunk is worked on: the loss and the gradient of the hidden states come out
of one forward pass (two GEMMs over the labelled tokens), and the head, being frozen, gets no gradient.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from megalora.ops.cross_entropy import PLAIN, LogitForm, forms_in_kernels, gradient_, statistics_
from megalora.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megalora.parallel.embedding import VocabParallelHead
from megalora.parallel.placement import Tokens
from megalora.parallel.trained_words import TrainedHead

# Logits of one chunk on this rank: enough rows for an efficient GEMM; on a CPU no more than 32 MiB in float32, which
# malloc gives again without fresh pages. A large vocabulary takes more: below FEWEST_ROWS, reading (and packing) the
# head for each chunk costs more than fresh pages do.
CHUNK_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 23}
FEWEST_ROWS = {"cuda": 1, "cpu": 256}
_SCALED = 1 << 23  # elements of the hidden states' gradient that are multiplied at a time


def chunk_rows(device_type: str, vocabulary: int) -> int:
    """Return the labelled tokens of one chunk, at most, over so much of the vocabulary."""
    kind = device_type if device_type in CHUNK_LOGITS else "cpu"
    return max(FEWEST_ROWS[kind], CHUNK_LOGITS[kind] // vocabulary)


class Labels(Protocol):
    """What a microbatch is to predict, as `cross_entropy_sum` takes it."""

    @property
    def labels(self) -> torch.Tensor | None: ...

    @property
    def labelled(self) -> torch.Tensor | None: ...

    @property
    def weights(self) -> torch.Tensor | None: ...

    @property
    def tokens(self) -> Tokens: ...


def next_token_loss(hidden: torch.Tensor, head: VocabParallelHead, inputs: Labels) -> torch.Tensor:
    """Return the summed loss of a causal language model on one microbatch (see `cross_entropy_sum`)."""
    return cross_entropy_sum(hidden, head, inputs.labels, inputs.labelled, inputs.weights, inputs.tokens)


def cross_entropy_sum(
    hidden: torch.Tensor,
    head: VocabParallelHead,
    labels: torch.Tensor,
    labelled: torch.Tensor,
    coefficients: torch.Tensor | None = None,
    tokens: Tokens | None = None,
) -> torch.Tensor:
    """Return the sum over the labelled tokens of -c log softmax(logits)[label], a float32 (or float64) scalar.

    hidden    [T, hidden_size]: this rank's tokens under sequence parallelism, else all F of them
    labels    [F] int64, already shifted; -100 where there is nothing to predict
    labelled  [L] int64, where labels is not -100
    coefficients  [L] float32 (or float64), c of each labelled token: that of its document or turn; None: all are 1
    tokens    of the microbatch, from which the dropout of an adapter on the head is drawn; None: no dropout
    The scalar is the same on every rank of the tp axis. hidden gets a gradient, and what of the head is trained.
    """
    trained = head.trained() if isinstance(head, TrainedHead) else []
    return _CrossEntropySum.apply(hidden, head, labels, labelled, coefficients, tokens, *trained)


def _logits(
    head: VocabParallelHead, hidden: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, LogitForm, tuple[torch.Tensor | float, ...]]:
    """Return (logits or what they are made of, what the kernels are left to make of it, what the gradient is left to be
    multiplied by).
    """
    s, form = head.unformed(hidden)
    if form == PLAIN or forms_in_kernels(s):
        return s, form, ()
    logits = form.apply_(s)
    return logits, PLAIN, form.factors(logits) if needs_grad else ()


def _times(d: torch.Tensor, factors: tuple[torch.Tensor | float, ...]) -> torch.Tensor:
    """Multiply d by the factors, in place, and return it."""
    for factor in factors:
        d.mul_(factor)
    return d


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, labelled, coefficients, tokens, *trained):
        tp = head.place.tp
        gathers = head.place.sequence_parallel and tp.size > 1
        full = all_gather(hidden, tp) if gathers else hidden
        everything = labelled.shape[0] == full.shape[0]
        needs_grad = any(ctx.needs_input_grad)
        dhidden, graph = None, None
        factors: tuple[torch.Tensor | float, ...]
        sums = [torch.zeros_like(one) for one in trained] if needs_grad else []
        if needs_grad:
            dhidden = torch.empty_like(full) if everything else torch.zeros_like(full)
        loss = torch.zeros((), dtype=torch.promote_types(full.dtype, torch.float32), device=full.device)
        widest = -(-head.vocab_size // tp.size)  # of all ranks: they must make the same chunks
        most = chunk_rows(full.device.type, widest)
        chunk = -(-labelled.shape[0] // -(-labelled.shape[0] // most)) if labelled.shape[0] else 1  # of equal size
        for start in range(0, labelled.shape[0], chunk):
            part = slice(start, start + chunk)
            rows = labelled[part]
            h = full[part] if everything else full.index_select(0, rows)
            if trained and needs_grad:
                with torch.enable_grad():
                    h = h.detach().requires_grad_()
                    graph = head.logits(h, rows, tokens)
                logits, form, factors = graph.detach().clone(), PLAIN, ()
            else:
                logits, form, factors = _logits(head, h, needs_grad)
            label = labels[rows] - head.start
            local, total, target = statistics_(logits, label, form)
            maximum = local
            if tp.size > 1:  # sums relative to the maximum of the whole vocabulary
                maximum = all_reduce(local.clone(), tp, dist.ReduceOp.MAX)
                total, target = all_reduce(torch.stack([total * (local - maximum).exp(), target]), tp)
            losses = total.log() + maximum - target
            loss += losses.sum() if coefficients is None else torch.dot(losses, coefficients[part].to(losses.dtype))
            if needs_grad:  # softmax - onehot
                d = gradient_(logits, label, local, maximum, total, form)
                if coefficients is not None:
                    d.mul_(coefficients[part].to(d.dtype).unsqueeze(-1))
                if graph is not None:
                    dh, *grads = torch.autograd.grad(graph, [h, *trained], d)
                    torch._foreach_add_(sums, grads)
                else:
                    dh = head.gradient(_times(d, factors))
                dhidden.index_copy_(0, rows, dh)
            logits, factors, graph, d = None, (), None, None  # their memory is for the next chunk's
        ctx.tp, ctx.gathers = tp, gathers
        ctx.save_for_backward(dhidden, *sums)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dhidden, *sums = ctx.saved_tensors
        # Each rank's dhidden is the term of its part of the vocabulary.
        # In float32: a factor rounded to bfloat16 would make all gradients of a step up to 0.4% too large or too small.
        # Some rows at a time: of a long row the float32 copies would be many GiB.
        scaled, size = torch.empty_like(dhidden), max(1, _SCALED // dhidden.shape[1])
        for into, rows in zip(scaled.split(size), dhidden.split(size), strict=True):
            into.copy_(rows.to(dloss.dtype) * dloss)
        reduced = reduce_scatter(scaled, ctx.tp) if ctx.gathers else all_reduce(scaled, ctx.tp)
        return reduced, None, None, None, None, None, *(one * dloss.to(one.dtype) for one in sums)
