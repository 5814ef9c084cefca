"""How one parameter lies over the tensor-parallel axis: read by loading, saving and gradient reduction alike.

Three words: a Part is a range of a dimension, the same in the file and here; a Cut is any rows of the file, in the
order in which they lie here (the q, k and v rows of a rank's heads in a fused linear); a Split is a whole
parameter, cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from megalora.parallel.mesh import Axis

Piece = tuple[int, int, int, int]  # (start, count, block, stride), see megalora.models.spec.Piece


class Run(NamedTuple):
    """Range [start, stop) of the file's dimension, which lies here from `at` on."""

    start: int
    stop: int
    at: int


def runs_of(pieces: Iterable[Piece]) -> tuple[Run, ...]:
    """Return the contiguous ranges of `pieces`, in order, neighbours joined."""
    found: list[Run] = []
    at = 0
    for start, count, block, stride in pieces:
        for first in (start + i * stride for i in range(count)):
            if found and found[-1].stop == first:
                found[-1] = found[-1]._replace(stop=first + block)
            elif block:
                found.append(Run(first, first + block, at))
            at += block
    return tuple(found)


@dataclass(frozen=True)
class Split:
    """This rank's part of one parameter.

    global_shape  shape of the whole parameter, as in the HF file
    dim           the dimension that is cut; None where every rank holds the whole
    pieces        what this rank holds along `dim`, in the order in which it lies here (none where dim is None)
    own           ranges along `dim` (dimension 0 where dim is None) of this rank's part that it counts where every
                  element must count once: of the ranks that hold an element, the first. None: all that it holds
    partial_grad  each rank's gradient is one term of a sum over the tp ranks that hold an element; the same on all
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    pieces: tuple[Piece, ...] = ()
    own: tuple[tuple[int, int], ...] | None = None
    partial_grad: bool = False

    @classmethod
    def range(cls, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Split:
        """Return the Split of a rank that holds [start, stop) along `dim`, and counts all of it."""
        return cls(shape, dim, ((start, 1, stop - start, 0),))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The contiguous ranges along `dim`; none where dim is None."""
        return runs_of(self.pieces)

    @property
    def local_shape(self) -> tuple[int, ...]:
        shape = list(self.global_shape)
        if self.dim is not None:
            shape[self.dim] = sum(count * block for _, count, block, _ in self.pieces)
        return tuple(shape)

    def blocks(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Yield (index in the whole tensor, index in this rank's part) of each contiguous block."""
        whole = [slice(0, n) for n in self.global_shape]
        if self.dim is None:
            yield tuple(whole), tuple(whole)
        for start, stop, at in self.runs:
            theirs, ours = whole.copy(), whole.copy()
            theirs[self.dim], ours[self.dim] = slice(start, stop), slice(at, at + stop - start)
            yield tuple(theirs), tuple(ours)

    def owned(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Return what this rank counts of its part [local_shape], as views."""
        if self.own is None:
            return [part]
        return [part.narrow(self.dim or 0, start, stop - start) for start, stop in self.own if stop > start]

    def slice(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the whole `tensor` [global_shape]: a view where it is one range."""
        assert tuple(tensor.shape) == self.global_shape, (tensor.shape, self.global_shape)
        parts = [tensor[theirs] for theirs, _ in self.blocks()]
        if not parts:
            return tensor.new_empty(self.local_shape)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Copy this rank's `part` [local_shape] to its places in `whole` [global_shape]."""
        for theirs, ours in self.blocks():
            whole[theirs].copy_(part[ours])


def shard_range(size: int, part: int, parts: int, step: int = 1) -> tuple[int, int]:
    """Return the range [start, stop) of `part` when `size` is cut into `parts` contiguous ranges as even as possible.

    step  ranges are multiples of it, where `size` is and has enough for each that they stay about even
    """
    if size % step or size // step < 8 * parts:
        step = 1
    steps = size // step
    return steps * part // parts * step, steps * (part + 1) // parts * step


def whole_split(shape: tuple[int, ...], tp: Axis, partial_grad: bool = False) -> Split:
    """Return the Split of a parameter that every tp rank holds whole; the first rank counts it."""
    own = ((0, shape[0]),) if tp.is_first else ()
    return Split(shape, own=own, partial_grad=partial_grad and tp.size > 1)


@dataclass(frozen=True)
class Cut:
    """This rank's rows of a dimension, in the order in which they lie here.

    own     ranges of them that this rank counts
    shared  some rank holds what another holds too (the same on all ranks)
    """

    pieces: tuple[Piece, ...]
    own: tuple[tuple[int, int], ...]
    shared: bool = False

    def split(self, shape: tuple[int, ...], dim: int) -> Split:
        """Return the Split of a parameter of that whole shape, cut along `dim`."""
        return Split(shape, dim, self.pieces, self.own, self.shared)


@dataclass(frozen=True)
class Part:
    """This rank's range [start, stop) of a dimension, of which it counts [own_start, own_stop).

    shared  some rank holds what another holds too (the same on all ranks)
    """

    start: int
    stop: int
    own_start: int
    own_stop: int
    shared: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start

    def times(self, size: int) -> Part:
        """Return the range of the elements where each position of this one stands for `size` of them."""
        return Part(self.start * size, self.stop * size, self.own_start * size, self.own_stop * size, self.shared)

    def cut(self) -> Cut:
        """Return the same rows as a Cut."""
        pieces = ((self.start, 1, self.size, 0),)
        return Cut(pieces, ((self.own_start - self.start, self.own_stop - self.start),), self.shared)


def joined_cut(parts: Sequence[tuple[Part, int, Sequence[Piece]]]) -> Cut:
    """Return the Cut of several outputs of one fused linear, one after another.

    parts  of each output this rank's units, the rows of one unit, and where the rows of these units lie in the file
    """
    sizes = [part.size * unit for part, unit, _ in parts]
    before = itertools.accumulate([0, *sizes])
    own = tuple(
        (at + (part.own_start - part.start) * unit, at + (part.own_stop - part.start) * unit)
        for at, (part, unit, _) in zip(before, parts, strict=False)
    )
    pieces = tuple(
        (start, count, block, stride) for _, _, places in parts for start, count, block, stride in places
    )
    return Cut(pieces, own, any(part.shared for part, _, _ in parts))


def even_part(size: int, tp: Axis, step: int = 1) -> Part:
    """Return this rank's part where `size` is cut into contiguous ranges as even as possible (see `shard_range`)."""
    start, stop = shard_range(size, tp.rank, tp.size, step)
    return Part(start, stop, start, stop)


@dataclass(frozen=True)
class HeadCut:
    """The attention heads of one tp rank: query heads cut as evenly as can be, and the KV heads that they read."""

    query: Part
    kv: Part


def cut_heads(heads: int, kv_heads: int, tp: Axis) -> HeadCut:
    """Return the HeadCut of this rank: query head h reads KV head h * kv_heads // heads.

    A KV head that several ranks read is held, and trained, by each.
    """

    def read(rank: int) -> tuple[int, int]:
        first, stop = shard_range(heads, rank, tp.size)
        return first * kv_heads // heads, (stop - 1) * kv_heads // heads + 1

    start, stop = read(tp.rank)
    before = read(tp.rank - 1)[1] if tp.rank else 0
    shared = sum(b - a for a, b in map(read, range(tp.size))) > kv_heads
    return HeadCut(even_part(heads, tp), Part(start, stop, max(start, before), stop, shared))


def kv_copies(heads: int, kv_heads: int, tp: Axis) -> list[int]:
    """Return how many ranks hold each KV head of this rank, itself included (see `cut_heads`)."""
    ranges = [cut_heads(heads, kv_heads, Axis(rank, tp.ranks)).kv for rank in range(tp.size)]
    mine = ranges[tp.rank]
    return [sum(kv.start <= head < kv.stop for kv in ranges) for head in range(mine.start, mine.stop)]


def named_splits(module: nn.Module) -> dict[str, Split]:
    """Return the Split of every parameter below `module`, by parameter name.

    A module that cuts parameters says so in `shard_dims() -> {relative name: Split}`; any other parameter is whole
    on every rank, with the same gradient on each (no such parameter is trainable today).
    """
    splits: dict[str, Split] = {}
    for prefix, child in module.named_modules():
        declare = getattr(child, "shard_dims", None)
        if declare is not None:
            dot = f"{prefix}." if prefix else ""
            splits.update({dot + name: split for name, split in declare().items()})
    for name, parameter in module.named_parameters(remove_duplicate=False):
        splits.setdefault(name, Split(tuple(parameter.shape)))
    return splits
