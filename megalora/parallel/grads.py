"""Gradients of the adapters: one flat buffer, summed over tp where they are partial and over dp, once a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megalora.parallel.collectives import all_reduce
from megalora.parallel.mesh import Axis, ParallelMesh
from megalora.parallel.split import Split


class FlatGradients:
    """The `.grad` of every trainable parameter of this stage, as views of one flat buffer.

    parameters  by name; their dtype (float32, or float64) is the buffer's
    splits      of the same names: which gradients are partial sums, and how often an element is held
    device      of the buffer, where a stage has nothing to train
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        splits: Mapping[str, Split],
        mesh: ParallelMesh,
        device: torch.device | str = "cpu",
    ):
        self._mesh = mesh
        self._parameters = dict(parameters)
        # Partial ones first, so that one slice of the buffer holds what tp reduces.
        names = sorted(parameters, key=lambda name: not splits[name].partial_grad)
        self._splits = {name: splits[name] for name in names}
        first = next(iter(parameters.values()), None)
        dtype = torch.float32 if first is None else first.dtype
        device = device if first is None else first.device
        sizes = [parameters[name].numel() for name in names]
        self.buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self._views = {}
        for name, part in zip(names, self.buffer.split(sizes), strict=True):
            self._views[name] = part.view_as(parameters[name])
        owned = [part for name, view in self._views.items() for part in self._splits[name].owned(view)]
        counts_all = sum(part.numel() for part in owned) == self.buffer.numel()
        self._owned = [self.buffer] if counts_all else [part for part in owned if part.numel()]
        self.zero()

    def zero(self) -> None:
        """Clear the buffer and hang its views into the parameters, for autograd to accumulate into."""
        self.buffer.zero_()
        for name, view in self._views.items():
            self._parameters[name].grad = view

    def reduce(self) -> None:
        """Sum the partial gradients over tp, then all over dp. After it, every rank holds the whole gradient."""
        self._reduce_partial(self._mesh.tp)
        if self.buffer.numel():
            all_reduce(self.buffer, self._mesh.replicas)

    def _reduce_partial(self, tp: Axis) -> None:
        """Sum each partial gradient at its place in the whole tensor: other ranks' parts stay as they are."""
        partial = [name for name, split in self._splits.items() if split.partial_grad]
        if tp.size == 1 or not partial:
            return
        sizes = [torch.Size(self._splits[name].global_shape).numel() for name in partial]
        whole = self.buffer.new_zeros(sum(sizes))
        wholes = [
            flat.view(self._splits[name].global_shape) for name, flat in zip(partial, whole.split(sizes), strict=True)
        ]
        for name, place in zip(partial, wholes, strict=True):
            self._splits[name].put(place, self._views[name])
        all_reduce(whole, tp)
        for name, place in zip(partial, wholes, strict=True):
            self._views[name].copy_(self._splits[name].slice(place))

    def square_sum(self) -> torch.Tensor:
        """Return this rank's share of the squared global gradient norm, float64 scalar: sums over the world to the
        whole.

        Every element counts once: on the first tp rank that holds it, and divided by the dp ranks, which all do.
        """
        if not self.buffer.numel() or not self._owned:
            return torch.zeros((), dtype=torch.float64, device=self.buffer.device)
        norms = torch.stack(torch._foreach_norm(self._owned, 2, dtype=torch.float64))
        return norms.square().sum() / self._mesh.replicas.size
