"""Parts of a layer that are computed again in backward instead of being kept.

A part is a run of a layer's steps. Of it only the residual stream that enters is kept, as one tensor, and where asked
for the results of its attention. In backward the part runs again; its last mixer's last product does not, for nobody
reads it. A part that treats every token alone (an MLP) runs in tiles of tokens, forward and backward, so that what lies
between its linears never exists for all tokens at once.

Legend: T tokens on this rank.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from megalora.models.inputs import Inputs
from megalora.models.offload import HostMemory, Place, Saved
from megalora.parallel.experts import ExpertGroup
from megalora.parallel.group import LinearGroup

Stream = tuple[torch.Tensor, torch.Tensor | None]
TILE = 8192  # tokens at once: products of so many rows are as fast as any


class Step(Protocol):
    """A step of a layer (megalora.models.blocks.layer).

    by_token      it treats every token alone
    sums_first    the `hidden` that it returns is the sum of the two that it was given
    reads_result  it does more with the result of its mixer than to return it
    """

    by_token: bool
    sums_first: bool
    reads_result: bool

    @property
    def groups(self) -> Sequence[LinearGroup | ExpertGroup]: ...

    def __call__(self, hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs) -> Stream: ...


@dataclass(frozen=True)
class Part:
    """Steps that are computed again together.

    tile              tokens at once in a part that treats every token alone, over all tensor-parallel ranks that share
                      them; 0: all
    keeps_attention   the results of its attention are kept
    """

    steps: tuple[Step, ...]
    tile: int = 0
    keeps_attention: bool = False

    @functools.cached_property
    def trains(self) -> bool:
        """Whether any of its linears is trained."""
        groups = [group for step in self.steps for group in step.groups]
        return any(linear.trainables() for group in groups for linear in group.linears)

    def tiles(self, local: int, full: int) -> list[slice]:
        """Return the tiles of `local` tokens on this rank, which gathers `full`; none where all run at once."""
        size = self.tile // max(1, full // local)
        if not self.tile or not all(step.by_token for step in self.steps) or local <= size:
            return []
        return [slice(start, min(start + size, local)) for start in range(0, local, size)]


class Recomputer:
    """Runs the recomputed parts of one microbatch. host: where to keep what `offloads` asks for."""

    def __init__(self, host: HostMemory | None = None):
        self._host = host
        self._last: Saved | None = None

    def run(
        self, part: Part, hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs, offloads: bool = False
    ) -> Stream:
        """Return what the part's steps return, for autograd; what is kept is kept in host memory with `offloads`."""
        streams = (hidden, delta, inputs.memory)
        flows = any(stream is not None and stream.requires_grad for stream in streams)
        if not (flows or part.trains):
            for step in part.steps:
                hidden, delta = step(hidden, delta, inputs)
            return hidden, delta
        saved = Saved(self._host, self._last, offloads)
        self._last = saved
        return _Recomputed.apply(hidden, delta, inputs.memory, _anchor(hidden), part, inputs, saved, False)


class _Recomputed(torch.autograd.Function):
    """anchor: what makes autograd call backward where the stream needs no gradient, but the part's adapters do.
    memory: inputs.memory, whose gradient the part adds to. unread: nobody reads the delta that is returned, so it is
    not computed."""

    @staticmethod
    def forward(ctx, hidden, delta, memory, anchor, part, inputs, saved, unread):
        kept = AttentionKept(saved) if part.keeps_attention else None
        first, tiles = part.steps[0], part.tiles(hidden.shape[0], inputs.tokens.index.shape[0])
        if unread or not first.sums_first:
            hidden, delta = _sum(hidden, delta), None
        memory = None if memory is None else memory.detach()
        entered, running = hidden, replace(inputs, attention_kept=kept, chosen={}, memory=memory)
        if unread:
            delta = _nothing(hidden)
        else:
            hidden, delta = _first_run(first, part.tile, hidden, delta, running)
            entered = hidden if first.sums_first else entered
            for step in part.steps[1:]:
                hidden, delta = _first_run(step, part.tile, hidden, delta, running)
        ctx.part, ctx.inputs, ctx.kept, ctx.tiles = part, running, kept, tiles
        ctx.saved, ctx.entered = saved, saved.put(entered)
        ctx.set_materialize_grads(False)
        return hidden, delta

    @staticmethod
    def backward(ctx, dhidden, ddelta):
        part, inputs, flows = ctx.part, ctx.inputs, any(ctx.needs_input_grad[:2])
        memory = inputs.memory
        if ctx.needs_input_grad[2]:
            memory = memory.detach().requires_grad_()
            inputs = replace(inputs, memory=memory)
        ctx.saved.begin()
        entered, ctx.entered, ctx.inputs = ctx.entered.take(), None, None
        if ctx.tiles:
            grad = _backward_by_tiles(part, entered, dhidden, ddelta, inputs, ctx.tiles, flows)
        else:
            entered = entered.detach().requires_grad_(flows)
            with torch.enable_grad():
                hidden, delta = _again(part, entered, inputs)
            _backward([hidden, delta], [dhidden, ddelta])
            grad = entered.grad
        d_memory = memory.grad if ctx.needs_input_grad[2] else None
        return grad, grad if ctx.needs_input_grad[1] else None, d_memory, None, None, None, None, None


def _run(steps: Sequence[Step], hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs) -> Stream:
    for step in steps:
        hidden, delta = step(hidden, delta, inputs)
    return hidden, delta


def _first_run(
    step: Step, tile: int, hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs
) -> Stream:
    """Return what the step returns, of tiles one after another where it treats every token alone. Not for autograd."""
    tiles = Part((step,), tile).tiles(hidden.shape[0], inputs.tokens.index.shape[0])
    if not tiles:
        return step(hidden, delta, inputs)
    hidden, added = _sum(hidden, delta), None
    for rows in tiles:
        part = step(hidden[rows], None, _tile(inputs, rows))[1]
        added = torch.empty_like(hidden) if added is None else added
        added[rows] = part
    return hidden, added


def _sum(hidden: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
    return hidden if delta is None else hidden + delta


def _again(part: Part, entered: torch.Tensor, inputs: Inputs) -> Stream:
    """Return the stream behind the part, for autograd; its delta has a gradient but no value where none is needed."""
    *before, last = part.steps
    unread = replace(inputs, unread=_leaves_unread(last))
    hidden, delta = _run(before, entered, None, inputs)
    alone = Part((last,), part.tile)
    if before and alone.tiles(hidden.shape[0], inputs.tokens.index.shape[0]) and (hidden.requires_grad or alone.trains):
        return _Recomputed.apply(hidden, delta, None, _anchor(hidden), alone, unread, Saved(), True)
    return last(hidden, delta, unread)


def _backward_by_tiles(part, entered, dhidden, ddelta, inputs, tiles, flows) -> torch.Tensor | None:
    """Return the gradient of what entered a part that treats every token alone."""
    grad, unread = torch.empty_like(entered) if flows else None, _leaves_unread(part.steps[-1])
    for rows in tiles:
        tile = entered[rows].detach().requires_grad_(flows)
        with torch.enable_grad():
            hidden, delta = _run(part.steps, tile, None, replace(_tile(inputs, rows), unread=unread))
        _backward([hidden, delta], [None if d is None else d[rows] for d in (dhidden, ddelta)])
        if grad is not None:
            grad[rows] = tile.grad
    return grad


def _leaves_unread(step: Step) -> bool:
    """Return whether the last product of the step may be left out where nobody reads what the step returns."""
    return step.by_token and not step.reads_result


def _backward(outputs: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor | None]) -> None:
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


def _tile(inputs: Inputs, rows: slice) -> Inputs:
    return replace(inputs, tokens=inputs.tokens.rows(rows))


def _anchor(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """Return a tensor of that shape which has no memory of its own."""
    return like.new_zeros(1).expand(like.shape)


class AttentionKept:
    """The results of a part's attention, kept beside what enters it: in backward they are not computed again.

    The first run records the autograd graph of attention from its inputs on. Where that graph saved an input, or a view
    of one, a note of it is kept instead: backward reads the input as the second run made it. What else the graph saved,
    the result and its statistics, is kept.
    """

    def __init__(self, saved: Saved):
        self._saved = saved
        self._graphs: list[_Attention] = []

    def __call__(self, function: Callable[..., torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
        """Return function(*sources): computed here where gradients are off, else as the first run computed it."""
        if not torch.is_grad_enabled():
            self._graphs.append(_Attention(self._saved))
            return self._graphs[-1].record(function, sources)
        return _Replayed.apply(self._graphs.pop(0), *sources)


# Where a tensor lies: its storage's address, and its offset there. Hooks must not hold the tensor itself: autograd
# holds them for as long as what they packed.
_Origin = tuple[int, int]


def _origin(tensor: torch.Tensor) -> _Origin:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


@dataclass(frozen=True)
class _View:
    """A view of one of the inputs, or (source None) of the result; offset from its first element."""

    source: int | None
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor, bases: Mapping[int | None, _Origin]) -> _View | None:
        """Return the note of `tensor` where it lies in one of `bases`, else None."""
        place = tensor.untyped_storage().data_ptr()
        for source, (storage, offset) in bases.items():
            if storage == place:
                return cls(source, tensor.size(), tensor.stride(), int(tensor.storage_offset()) - offset)
        return None

    def restored(self, base: torch.Tensor) -> torch.Tensor:
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


class _Attention:
    """One attention between its first run and its backward."""

    def __init__(self, saved: Saved):
        self._saved = saved
        self.sources: tuple[torch.Tensor, ...] = ()  # the inputs, while a run needs them
        self.gradients: tuple[torch.Tensor | None, ...] = ()
        self.dout: torch.Tensor | None = None
        self._end: torch.Tensor | None = None  # what backward starts from
        self._result: Place | torch.Tensor | None = None

    def record(self, function: Callable[..., torch.Tensor], sources: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return function(*sources), whose graph is kept."""
        kept: list[list[Any]] = []
        origins = {number: _origin(source) for number, source in enumerate(sources)}

        def pack(tensor: torch.Tensor) -> list[Any]:
            kept.append([_View.of(tensor, origins) or tensor])
            return kept[-1]

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            start = sources[0].new_zeros(()).requires_grad_()
            out = function(*_Start.apply(start, self, *sources))
            self._end = _End.apply(out, self)
        result = out.detach()
        for box in kept:
            if isinstance(box[0], torch.Tensor):
                box[0] = _View.of(box[0], {None: _origin(result)}) or self._saved.put(box[0])
        self._result = self._saved.put(result)
        return result

    def _unpack(self, box: list[Any]) -> torch.Tensor:
        (kept,) = box
        if not isinstance(kept, _View):
            return kept.take()
        return kept.restored(self.result() if kept.source is None else self.sources[kept.source])

    def result(self) -> torch.Tensor:
        """Return what attention gave."""
        if not isinstance(self._result, torch.Tensor):
            self._result = self._result.take()
        return self._result

    def backward(self, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the inputs, which stand in `sources`."""
        self.dout, end, self._end = dout, self._end, None
        torch.autograd.backward(end)
        gradients, self.gradients, self.sources, self._result = self.gradients, (), (), None
        return gradients


class _Start(torch.autograd.Function):
    """The inputs of a recorded attention: its gradients end here. The graph holds none of them."""

    @staticmethod
    def forward(ctx, start, graph, *sources):
        ctx.graph = graph
        return tuple(source.view_as(source) for source in sources)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.graph.gradients = gradients
        return None, None, *(None for _ in gradients)


class _End(torch.autograd.Function):
    """The result of a recorded attention, as a tensor that does not hold it."""

    @staticmethod
    def forward(ctx, out, graph):
        ctx.graph = graph
        return out.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        dout, ctx.graph.dout = ctx.graph.dout, None
        return dout, None


class _Replayed(torch.autograd.Function):
    """A recorded attention in the second run of its part."""

    @staticmethod
    def forward(ctx, graph, *sources):
        ctx.graph, graph.sources = graph, tuple(source.detach() for source in sources)
        return graph.result().detach()

    @staticmethod
    def backward(ctx, dout):
        return None, *ctx.graph.backward(dout)


# ---- inputs of linears that are made again


def made_again(x: torch.Tensor, make: Callable[[], torch.Tensor]) -> contextlib.AbstractContextManager:
    """Return a context in which autograd keeps no x, but calls `make` for it in backward: x must be what that returns.
    """
    origins = {0: _origin(x)}

    def pack(tensor: torch.Tensor) -> _View | torch.Tensor:
        return _View.of(tensor, origins) or tensor

    def unpack(kept: _View | torch.Tensor) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept.restored(make())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
