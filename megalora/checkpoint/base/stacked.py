"""Files that hold one tensor for all experts of a layer, [E, ...], where a model has one for each; and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megalora.checkpoint.base.source import BaseWeights
from megalora.errors import UserError
from megalora.ops.fp8 import Fp8Weight
from megalora.ops.nf4 import Nf4Weight

Stacks = Mapping[str, Sequence[str]]


class Unstacked:
    """`weights` with each tensor of `stacks` (its name -> names of its parts along dimension 0) as its parts.

    Raises UserError where a tensor has not as many entries as parts.
    """

    def __init__(self, weights: BaseWeights, stacks: Stacks):
        self._weights = weights
        self._places: dict[str, tuple[str, int]] = {}
        shapes = dict(weights.shapes)
        for name, parts in stacks.items():
            shape = shapes.pop(name, None)
            if shape is None:
                continue
            if len(shape) < 2 or shape[0] != len(parts):
                raise UserError(
                    f"{weights.where(name)}: {name} has shape {list(shape)}, but config.json means {len(parts)} "
                    f"experts",
                    "take weights and config.json from one model",
                )
            self._places |= {part: (name, index) for index, part in enumerate(parts)}
            shapes |= dict.fromkeys(parts, tuple(shape[1:]))
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def where(self, name: str) -> str:
        return self._weights.where(self._places.get(name, (name, 0))[0])

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self._places.get(name, (name, 0))[0])

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        if name not in self._places:
            return self._weights.copy(name, index, out)
        stack, place = self._places[name]
        return self._weights.copy(stack, (slice(place, place + 1), *index), out.unsqueeze(0))

    def stored(self, name: str) -> Nf4Weight | Fp8Weight | None:
        return None if name in self._places else self._weights.stored(name)


class Joined:
    """`weights` with tensors that they have in parts, one behind another along dimension 0, as one each.

    joins  names of such tensors -> those of their parts, in order; what `weights` have as one is left as it is
    """

    def __init__(self, weights: BaseWeights, joins: Stacks):
        self._weights = weights
        shapes = dict(weights.shapes)
        self._parts: dict[str, list[str]] = {}
        for name, parts in joins.items():
            if name in shapes or not all(len(shapes.get(part, ())) > 0 for part in parts):
                continue
            sizes = [shapes.pop(part) for part in parts]
            self._parts[name] = list(parts)
            shapes[name] = (sum(size[0] for size in sizes), *sizes[0][1:])
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def where(self, name: str) -> str:
        return self._weights.where(self._parts.get(name, [name])[0])

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self._parts.get(name, [name])[0])

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        if name not in self._parts:
            return self._weights.copy(name, index, out)
        before, rows = 0, range(*index[0].indices(self.shapes[name][0]))
        for part in self._parts[name]:
            count = self._weights.shapes[part][0]
            start, stop = (min(max(0, at - before), count) for at in (rows.start, rows.stop))
            if start < stop:
                at = before + start - rows.start
                self._weights.copy(part, (slice(start, stop), *index[1:]), out[at : at + stop - start])
            before += count
        return None

    def stored(self, name: str) -> Nf4Weight | Fp8Weight | None:
        return None if name in self._parts else self._weights.stored(name)


class Stacked:
    """`weights` with the parts of each tensor of `stacks` as that tensor, for files: the inverse of Unstacked."""

    def __init__(self, weights: BaseWeights, stacks: Stacks):
        self._weights, self._stacks = weights, stacks
        parts = {part for names in stacks.values() for part in names}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            **{name: shape for name, shape in weights.shapes.items() if name not in parts},
            **{name: (len(names), *weights.shapes[names[0]]) for name, names in stacks.items()},
        }

    def where(self, name: str) -> str:
        return self._weights.where(self._stacks.get(name, (name,))[0])

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self._stacks.get(name, (name,))[0])

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        if name not in self._stacks:
            return self._weights.copy(name, index, out)
        for place, part in enumerate(self._stacks[name][index[0]]):
            self._weights.copy(part, index[1:], out[place])
        return None

    def stored(self, name: str) -> Nf4Weight | Fp8Weight | None:
        return None if name in self._stacks else self._weights.stored(name)
