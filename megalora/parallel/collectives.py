"""The collectives that the layers use. All act on dimension 0 (tokens) and are the identity on an axis of one rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist

from megalora.errors import UserError
from megalora.parallel.mesh import Axis

T = TypeVar("T")

# torch 2.13 gave them new names, and warns of the old ones, which are all that torch before it has.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective under way: `wait()` gives its result."""

    def __init__(self, tensor: torch.Tensor, work: dist.Work | None, axis: Axis):
        self._tensor, self._work, self._axis = tensor, work, axis

    def wait(self) -> torch.Tensor:
        if self._work is not None:
            with self._axis.timed():
                self._work.wait()
            self._work = None
        return self._tensor


def all_reduce_async(x: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """Start the reduction of x over the axis, in place: compute that does not need it may run until `wait()`."""
    if axis.size == 1:
        return Pending(x, None, axis)
    return Pending(x, dist.all_reduce(x, op=op, group=axis.group, async_op=True), axis)


def all_reduce(x: torch.Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Return x reduced over the axis, in place, on every rank."""
    return all_reduce_async(x, axis, op).wait()


def all_gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Map [T, ...] of each rank to [size * T, ...], in rank order. Its opposite is `reduce_scatter`."""
    if axis.size == 1:
        return x
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    with axis.timed():
        _all_gather_single(out, x.contiguous(), group=axis.group)
    return out


def reduce_scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Map [size * T, ...] on each rank to this rank's [T, ...] of the sum. Its opposite is `all_gather`."""
    if axis.size == 1:
        return x
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    with axis.timed():
        _reduce_scatter_single(out, x.contiguous(), group=axis.group)
    return out


def local_tokens(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return this rank's [T / size, ...] of x [T, ...], which every rank holds whole; a view."""
    part = x.shape[0] // axis.size
    return x[axis.rank * part : (axis.rank + 1) * part]


def broadcast_object(value: T, axis: Axis, source: int = 0) -> T:
    """Return `value` of the rank at position `source` of the axis, on every rank of it (any picklable object)."""
    if axis.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=axis.ranks[source], group=axis.group)
    return box[0]


def gather_objects(value: object, axis: Axis) -> list:
    """Return the `value` of every rank of the axis, in rank order, on every rank (any picklable object)."""
    if axis.size == 1:
        return [value]
    values: list = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def tell_once(lines: Iterable[str], axis: Axis) -> None:
    """Print on the first rank of the axis what its ranks have to say, a line that several have once. Collective."""
    said = gather_objects(list(lines), axis)
    if axis.is_first:
        for line in dict.fromkeys(line for part in said for line in part):
            print(f"megalora: {line}", file=sys.stderr, flush=True)


def tell_stage(text: str, axis: Axis) -> None:
    """Print on the first rank of the axis, at a terminal, what begins now and may take a while."""
    if axis.is_first and sys.stdout.isatty():
        print(text, flush=True)


def agree(error: UserError | None, axis: Axis) -> None:
    """Raise on every rank of the axis when any rank brings an error, so that no rank waits for one that left.

    The message is that of the lowest rank that has one, with its rank named unless all have the same.
    """
    errors = gather_objects(None if error is None else (type(error), error.message, error.hint), axis)
    failed = [rank for rank, parts in enumerate(errors) if parts is not None]
    if failed:
        kind, message, hint = errors[failed[0]]
        same = len(failed) == axis.size and len(set(errors)) == 1
        raise kind(message if same or failed[0] == 0 else f"{message} (on rank {axis.ranks[failed[0]]})", hint)


def on_first(work: Callable[[], T], axis: Axis) -> T:
    """Return what `work` gives on the first rank of the axis, on every rank of it; its UserError too."""
    value, error = None, None
    if axis.is_first:
        try:
            value = work()
        except UserError as raised:
            error = type(raised), raised.message, raised.hint
    value, error = broadcast_object((value, error), axis)
    if error is not None:
        kind, *parts = error
        raise kind(*parts)
    return value


class together:
    """`with together(axis):` a phase in which a UserError of one rank stops them all (see `agree`)."""

    def __init__(self, axis: Axis):
        self._axis = axis

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: object) -> None:
        if value is None or isinstance(value, UserError):
            agree(value, self._axis)
