"""Context parallelism in attention: the keys and values that a rank's queries see, from all ranks of the axis.

With grouped queries keys and values are a fraction of the activations: they are gathered whole, once a layer, which
takes far less time than attention itself. Each rank then reads, for each of its pieces, the keys of that document up
to the piece (megalora.data.context says how documents are cut): a copy of them for each piece, for kernels that read
rows of pieces, or where the pieces are few and long parts of one copy of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch

from megalora.batch import Context
from megalora.ops.merged_attention import takes_pieces
from megalora.ops.piece_attention import Pieces
from megalora.parallel.collectives import all_gather, reduce_scatter
from megalora.parallel.mesh import Axis


class ContextKeys:
    """The keys of one microbatch's pieces on this rank. context: of the batch."""

    def __init__(self, axis: Axis, context: Context, device: torch.device):
        self._axis, self._context, self._device = axis, context, device
        self._seen: dict[int | str | None, tuple[torch.Tensor, Pieces]] = {}

    def gather(
        self, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, Pieces]:
        """Return (keys, values [S, K, D] of all pieces, where the pieces lie).

        k, v [T, K, D and V] of this rank's tokens; window: no query sees further back. For autograd: gradients are
        summed over the ranks. Collective over the axis.
        """
        same = k.shape[-1] == v.shape[-1]
        if window is None and same and takes_pieces(k.shape[-1], k.dtype, k.device, self._context.lengths):
            index, pieces = self._whole()
        else:
            index, pieces = self._index(window)
        return *_Gather.apply(k, v, index, self._axis), pieces

    def _whole(self) -> tuple[torch.Tensor, Pieces]:
        """Return all tokens in the order of the microbatch, and where the pieces lie there."""
        if "whole" not in self._seen:
            context = self._context
            spans = tuple(zip(context.documents, context.stops, strict=True))
            index = context.place.to(self._device, non_blocking=True)
            self._seen["whole"] = index, Pieces(_bounds(context.lengths), (), spans=spans)
        return self._seen["whole"]

    def _index(self, window: int | None) -> tuple[torch.Tensor, Pieces]:
        if window not in self._seen:
            context = self._context
            starts = [
                max(document, stop - length + 1 - window) if window is not None else document
                for document, stop, length in zip(context.documents, context.stops, context.lengths, strict=True)
            ]
            spans = [torch.arange(a, b) for a, b in zip(starts, context.stops, strict=True)]
            index = context.place[torch.cat(spans)].to(self._device, non_blocking=True)
            queries, keys = _bounds(context.lengths), _bounds([len(span) for span in spans])
            self._seen[window] = index, Pieces.of(queries, keys, self._device)
        return self._seen[window]


def _bounds(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


class _Gather(torch.autograd.Function):
    """Forward gathers all ranks' keys and values and takes those at `index`; backward adds them up and reduce-scatters.
    """

    @staticmethod
    def forward(ctx, k, v, index, axis):
        ctx.axis, ctx.rows, ctx.width = axis, k.shape[0], k.shape[-1]
        ctx.save_for_backward(index)
        both = all_gather(torch.cat([k, v], -1), axis).index_select(0, index)
        return both[..., : ctx.width], both[..., ctx.width :]

    @staticmethod
    def backward(ctx, dk, dv):
        (index,) = ctx.saved_tensors
        dy = torch.cat([dk, dv], -1)
        dx = dy.new_zeros(ctx.rows * ctx.axis.size, *dy.shape[1:]).index_add_(0, index, dy)
        dx = reduce_scatter(dx, ctx.axis)
        return dx[..., : ctx.width], dx[..., ctx.width :], None, None
