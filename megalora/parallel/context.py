"""Context parallelism in attention: the keys and values that a rank's queries see, from all ranks of the axis.

With grouped queries keys and values are a fraction of the activations: they are gathered whole, once a layer, which
takes far less time than attention itself. Each rank then reads, for each of its pieces, the keys of that document up
to the piece (megalora.data.context says how documents are cut).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch

from megalora.batch import Context
from megalora.ops.piece_attention import Pieces
from megalora.parallel.collectives import all_gather, reduce_scatter
from megalora.parallel.mesh import Axis


class ContextKeys:
    """The keys of one microbatch's pieces on this rank. context: of the batch."""

    def __init__(self, axis: Axis, context: Context, device: torch.device):
        self._axis, self._context, self._device = axis, context, device
        self._seen: dict[int | None, tuple[torch.Tensor, Pieces]] = {}

    def gather(
        self, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, Pieces]:
        """Return (keys, values [S, K, D] of all pieces, one piece after another, where the pieces lie).

        k, v [T, K, D and V] of this rank's tokens; window: no query sees further back. For autograd: gradients are
        summed over the ranks. Collective over the axis.
        """
        index, pieces = self._index(window)
        width = k.shape[-1]
        both = _Gather.apply(torch.cat([k, v], -1), index, self._axis)
        return both[..., :width], both[..., width:], pieces

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
    """Forward gathers all ranks' rows and takes those at `index`; backward adds them up and reduce-scatters."""

    @staticmethod
    def forward(ctx, x, index, axis):
        ctx.axis, ctx.rows = axis, x.shape[0]
        ctx.save_for_backward(index)
        return all_gather(x.contiguous(), axis).index_select(0, index)

    @staticmethod
    def backward(ctx, dy):
        (index,) = ctx.saved_tensors
        dx = dy.new_zeros(ctx.rows * ctx.axis.size, *dy.shape[1:]).index_add_(0, index, dy)
        return reduce_scatter(dx, ctx.axis), None, None
