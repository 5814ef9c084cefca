"""Cross entropy of the head's logits, with the vocabulary cut over tp and only labelled tokens computed.

The logits of a chunk exist only while the chunk is worked on: the loss and the gradient of the hidden states come out
of one forward pass (two GEMMs over the labelled tokens), and the head, being frozen, gets no gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalora.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megalora.parallel.embedding import VocabParallelHead

CHUNK_LOGITS = 1 << 23  # logits of one chunk on this rank: 32 MiB in float32


def cross_entropy_sum(hidden: torch.Tensor, head: VocabParallelHead, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the labelled tokens of -log softmax(hidden W^T)[label], as a float32 (or float64) scalar.

    hidden  [T, hidden_size]: this rank's tokens under sequence parallelism, else all F of them
    labels  [F] int64, already shifted; -100 where there is nothing to predict
    The scalar is the same on every rank of the tp axis. Only hidden gets a gradient.
    """
    return _CrossEntropySum.apply(hidden, head, labels)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels):
        tp = head.place.tp
        gathers = head.place.sequence_parallel and tp.size > 1
        full = all_gather(hidden, tp) if gathers else hidden
        labelled = (labels != -100).nonzero().squeeze(-1)
        dhidden = torch.zeros_like(full) if ctx.needs_input_grad[0] else None
        precise = torch.promote_types(full.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=full.device)
        widest = -(-head.vocab_size // tp.size)  # of all ranks: they must make the same chunks
        chunk = max(1, CHUNK_LOGITS // widest)
        for rows in labelled.split(chunk):
            h = full.index_select(0, rows)
            logits = (h @ head.weight.t()).to(precise)
            local = labels[rows] - head.start
            mine = (local >= 0) & (local < head.weight.shape[0])
            place = (local * mine).unsqueeze(-1)
            peak = all_reduce(logits.amax(-1), tp, dist.ReduceOp.MAX)
            logits.sub_(peak.unsqueeze(-1))
            target = logits.gather(-1, place).squeeze(-1) * mine
            total, target = all_reduce(torch.stack([logits.exp_().sum(-1), target]), tp)
            loss += (total.log() - target).sum()
            if dhidden is not None:  # softmax - onehot
                probabilities = logits.div_(total.unsqueeze(-1))
                probabilities.scatter_add_(-1, place, -mine.unsqueeze(-1).to(precise))
                dhidden.index_copy_(0, rows, probabilities.to(h.dtype) @ head.weight)
        ctx.tp, ctx.gathers = tp, gathers
        ctx.save_for_backward(dhidden)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        (dhidden,) = ctx.saved_tensors
        # Each rank's dhidden is the term of its part of the vocabulary.
        dhidden = dhidden * dloss.to(dhidden.dtype)
        reduced = reduce_scatter(dhidden, ctx.tp) if ctx.gathers else all_reduce(dhidden, ctx.tp)
        return reduced, None, None
