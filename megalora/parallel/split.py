"""How one parameter lies over the tensor-parallel axis: read by loading, saving and gradient reduction alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megalora.parallel.mesh import Axis


@dataclass(frozen=True)
class Split:
    """This rank's part of one parameter.

    global_shape  shape of the whole parameter, as in the HF file
    dim           the dimension that is cut; None where every rank holds the whole
    start, stop   this rank's range along `dim` (0, 0 where dim is None)
    own           the range along `dim` (dimension 0 where dim is None) that this rank counts where every element must
                  count once: of the ranks that hold an element, the first. None: all that it holds
    partial_grad  each rank's gradient is one term of a sum over the tp ranks that hold an element; the same on all
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0
    own: tuple[int, int] | None = None
    partial_grad: bool = False

    @property
    def index(self) -> tuple[slice, ...]:
        """Index of this rank's part in the whole tensor (or in a safetensors slice)."""
        whole = [slice(0, n) for n in self.global_shape]
        if self.dim is not None:
            whole[self.dim] = slice(self.start, self.stop)
        return tuple(whole)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.index)

    def owned(self, part: torch.Tensor) -> torch.Tensor:
        """Of this rank's part [local_shape], what it counts; a view."""
        if self.own is None:
            return part
        dim = self.dim or 0
        return part.narrow(dim, self.own[0] - self.start, self.own[1] - self.own[0])

    def slice(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole `tensor` [global_shape], as a view."""
        assert tuple(tensor.shape) == self.global_shape, (tensor.shape, self.global_shape)
        return tensor[self.index]


def shard_range(size: int, part: int, parts: int, step: int = 1) -> tuple[int, int]:
    """Range [start, stop) of `part` when `size` is cut into `parts` contiguous pieces as even as possible.

    step  pieces are multiples of it, where `size` is and has enough for each that they stay about even
    """
    if size % step or size // step < 8 * parts:
        step = 1
    steps = size // step
    return steps * part // parts * step, steps * (part + 1) // parts * step


def whole_split(shape: tuple[int, ...], tp: Axis, partial_grad: bool = False) -> Split:
    """The Split of a parameter that every tp rank holds whole; the first rank counts it."""
    return Split(shape, own=(0, shape[0]) if tp.is_first else (0, 0), partial_grad=partial_grad and tp.size > 1)


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

    def times(self, size: int) -> Part:
        """The range of the elements where each position of this one stands for `size` of them."""
        return Part(self.start * size, self.stop * size, self.own_start * size, self.own_stop * size, self.shared)

    def split(self, shape: tuple[int, ...], dim: int) -> Split:
        """The Split of a parameter of that whole shape, cut along `dim` into this part."""
        return Split(shape, dim, self.start, self.stop, (self.own_start, self.own_stop), self.shared)


def even_part(size: int, tp: Axis, step: int = 1) -> Part:
    """This rank's part where `size` is cut into contiguous parts as even as possible; step as of `shard_range`."""
    start, stop = shard_range(size, tp.rank, tp.size, step)
    return Part(start, stop, start, stop)


def named_splits(module: nn.Module) -> dict[str, Split]:
    """The Split of every parameter below `module`, by parameter name.

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
