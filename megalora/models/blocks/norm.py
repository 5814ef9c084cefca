"""Norms with frozen weights: of the residual stream, whole on every tp rank; and of q and k, over heads."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from megalora.models import spec
from megalora.models.inputs import Inputs
from megalora.ops.fused_norm import Addend, NormWeights, add_fused_norm, takes
from megalora.ops.layer_norm import add_layer_norm, layer_norm, layer_weights
from megalora.ops.rms_norm import Rounding, add_rms_norm, rms_norm
from megalora.parallel.norm import rms_norm_across
from megalora.parallel.placement import Placement
from megalora.parallel.split import Part, Split


class Ends(Protocol):
    """What is done to delta before it is added (megalora.models.blocks.ending)."""

    def __call__(self, result: torch.Tensor, inputs: Inputs) -> torch.Tensor: ...

    def addend(self, inputs: Inputs) -> Addend: ...


class Norm(nn.Module):
    """A norm of the last dimension: `weight`, and `bias` where the spec has one, frozen.

    part  this rank's heads, or features, where the weight is cut over tp; None: it is whole
    """

    weight: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, norm: spec.Norm, place: Placement, part: Part | None = None):
        super().__init__()
        self.eps, self.offset = norm.eps, norm.offset
        self.rounding = Rounding(norm.offset, norm.precise)
        self._splits: dict[str, Split] = {}
        for name, shape in norm.tensors():
            name = name.rpartition(".")[2]
            if part is not None:
                self._splits[name] = part.cut().split(shape, 0)
                shape = self._splits[name].local_shape
            values = torch.empty(shape, dtype=place.dtype, device=place.device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        if not norm.bias:
            self.register_parameter("bias", None)
        if not norm.weighted:
            assert not norm.offset and not norm.bias, norm
            if norm.kind == "rms":
                ones = torch.ones(norm.size, dtype=place.dtype, device=place.device)
                self.register_buffer("weight", ones, persistent=False)  # in no file
            else:
                self.register_parameter("weight", None)

    def shard_dims(self) -> dict[str, Split]:
        return self._splits

    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        """Return the norm of x [..., size]: [..., size + room], undefined in the room."""
        raise NotImplementedError

    def after(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        room: int = 0,
        ending: Ends | None = None,
        inputs: Inputs | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x + delta, its norm with room), for x, delta [T, size]; delta None: (x, its norm).

        ending  what is done to delta before it is added, of `inputs`: on a GPU in the same pass
        """
        if delta is None:
            return x, self(x, room)
        if ending is not None:
            assert inputs is not None
            addend = ending.addend(inputs)
            if not addend.plain and takes(x, self.weights, room, addend):
                return add_fused_norm(x, delta, self.weights, room, addend)
            delta = ending(delta, inputs)
        return self.of_sum(x, delta, room)

    def of_sum(self, x: torch.Tensor, delta: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x + delta, its norm with room), for x, delta [T, size]."""
        raise NotImplementedError

    @property
    def weights(self) -> NormWeights:
        """What the kernels of a GPU take."""
        raise NotImplementedError


class RMSNorm(Norm):
    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, room, self.rounding)

    def of_sum(self, x: torch.Tensor, delta: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x, delta, self.weight, self.eps, room, self.rounding)

    @property
    def weights(self) -> NormWeights:
        return self.rounding.weights(self.weight, self.eps)


class LayerNorm(Norm):
    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, room, self.offset)

    def of_sum(self, x: torch.Tensor, delta: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps, room, self.offset)

    @property
    def weights(self) -> NormWeights:
        return layer_weights(self.weight, self.bias, self.eps, self.offset)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class NormOfEachHead(Norm):
    """LayerNorm of each head, with a weight of its own for each: `weight` [heads, size], or one tensor a head.

    modules  of the heads of this rank whose weights are apart: {full name below the norm's: module}
    """

    def __init__(self, norm: spec.Norm, place: Placement, part: Part):
        assert norm.kind == "layer" and not norm.bias and not norm.offset, norm
        if not norm.apart:
            super().__init__(norm, place, part)
            self.apart: dict[int, Norm] = {}
            return
        nn.Module.__init__(self)
        self.eps, self._splits = norm.eps, {}
        one = spec.Norm(norm.name, norm.size, norm.eps, norm.kind)
        self.apart = {head: LayerNorm(one, place) for head in range(part.start, part.stop)}

    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        """Return the norm of x [F, heads of this rank, size], in the same shape."""
        weight = torch.stack([one.weight for one in self.apart.values()]) if self.apart else self.weight
        wide = torch.promote_types(x.dtype, torch.float32)
        return (layer_norm(x.to(wide), None, None, self.eps) * weight).to(x.dtype)


class NormAcrossHeads(Norm):
    """RMSNorm over the features of all heads together, those of other ranks too.

    part    this rank's features
    copies  how many ranks hold each of this rank's heads
    """

    def __init__(self, norm: spec.Norm, place: Placement, part: Part, copies: list[int]):
        assert norm.kind == "rms", norm
        super().__init__(norm, place, part)
        self.size, self.tp = norm.size, place.tp
        dim = part.size // len(copies)
        self.share = 1 / torch.tensor(copies, dtype=place.master_dtype, device=place.device).repeat_interleave(dim)

    def forward(self, x: torch.Tensor, room: int = 0) -> torch.Tensor:
        """Return the norm of x [F, heads of this rank, size of a head], in the same shape."""
        flat = x.flatten(1)
        if self.tp.size == 1:
            return rms_norm(flat, self.weight, self.eps, rounding=self.rounding).view(x.shape)
        normed = rms_norm_across(flat, self.weight, self.eps, self.size, self.share, self.tp, self.rounding)
        return normed.view(x.shape)
