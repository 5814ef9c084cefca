"""T5's relative positions: a frozen table of biases by bucket of key - query, which the layers of a stack share."""

from __future__ import annotations

import math

import torch
from torch import nn

from megalora.models import spec
from megalora.models.blocks.ends import Frozen
from megalora.models.names import hang
from megalora.parallel.placement import Placement
from megalora.parallel.split import Part


class RelativeBias:
    """The table of a stack on one stage, registered once below `root`, and this rank's heads of it."""

    def __init__(self, root: nn.Module, table: spec.RelativeTable, heads: int, own: Part, place: Placement):
        try:
            found = root.get_submodule(table.name)  # of a layer before this one
        except AttributeError:
            found = Frozen((table.buckets, heads), None, place)
            hang(root, table.name, found)
        assert isinstance(found, Frozen), table.name
        self._table = found
        self._own, self._dtype = own, place.master_dtype
        self._buckets = buckets(table).to(place.device)

    def __call__(self) -> torch.Tensor:
        """Return the biases [H, 2 L + 1] of this rank's heads at key - query = -L .. L, L = `longest`; beyond as at L.

        In at least float32.
        """
        return self._table.weight[self._buckets, self._own.start : self._own.stop].t().to(self._dtype).contiguous()


def buckets(table: spec.RelativeTable) -> torch.Tensor:
    """Return the buckets [2 longest + 1] int64 of key - query from -longest to longest.

    Near distances have one each, farther ones share them by their logarithm (Raffel et al. 2020), which is taken in
    float32 as T5 does: another precision may move a border.
    """
    distance = torch.arange(-table.longest, table.longest + 1)
    count, start = table.buckets, torch.zeros_like(distance)
    if table.both_ways:
        count //= 2
        start = (distance > 0) * count
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = count // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(table.longest / exact)
    far = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
    return start + torch.where(distance < exact, distance, far)
