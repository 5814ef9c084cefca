"""Linears as data, and where the outputs of a fused one lie among its rows in the file. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Piece(NamedTuple):
    """Rows (or columns) of a tensor: `count` blocks of `block` rows, their starts `stride` apart, from `start` on."""

    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count(), which nobody calls
    block: int
    stride: int


@dataclass(frozen=True)
class Linear:
    """A linear layer: weight [out_features, in_features], or [in_features, out_features] where it is transposed."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    transposed: bool = False

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor in the file."""
        shape = (self.out_features, self.in_features)
        yield f"{self.name}.weight", shape[::-1] if self.transposed else shape
        if self.bias:
            yield f"{self.name}.bias", (self.out_features,)


class Rows(Protocol):
    """Where the outputs of a fused linear lie among its rows."""

    def pieces(self, part: str, start: int, stop: int) -> list[Piece]:
        """Return the rows of units [start, stop) of output `part`, in order."""
        ...

    def unit(self, part: str) -> int:
        """Return the rows of one unit of output `part`: a head's size, or 1."""
        ...


@dataclass(frozen=True)
class Blocked:
    """Outputs one after another: q, then k, then v; or gate, then up.

    parts  (name, units) of each, in file order; a unit is `size` rows, or as many as `size` has for each of them
    """

    parts: tuple[tuple[str, int], ...]
    size: int | tuple[int, ...] = 1

    def pieces(self, part: str, start: int, stop: int) -> list[Piece]:
        before = 0
        for name, units in self.parts:
            size = self.unit(name)
            if name == part:
                return [Piece(before + start * size, 1, (stop - start) * size, 0)]
            before += units * size
        raise KeyError(part)

    def unit(self, part: str) -> int:
        if isinstance(self.size, int):
            return self.size
        return self.size[[name for name, _ in self.parts].index(part)]


@dataclass(frozen=True)
class ByHead:
    """For each head its q, its k and its v (in `order`), of `size` rows each."""

    size: int
    order: tuple[str, ...] = ("q", "k", "v")

    def pieces(self, part: str, start: int, stop: int) -> list[Piece]:
        head = len(self.order) * self.size
        return [Piece(start * head + self.order.index(part) * self.size, stop - start, self.size, head)]

    def unit(self, part: str) -> int:
        return self.size


@dataclass(frozen=True)
class Interleaved:
    """For each head one after another its rows of every output: (name, rows) of each, in order."""

    parts: tuple[tuple[str, int], ...]

    def pieces(self, part: str, start: int, stop: int) -> list[Piece]:
        names, head = [name for name, _ in self.parts], sum(rows for _, rows in self.parts)
        before = sum(rows for _, rows in self.parts[: names.index(part)])
        return [Piece(start * head + before, stop - start, self.unit(part), head)]

    def unit(self, part: str) -> int:
        return dict(self.parts)[part]


@dataclass(frozen=True)
class ByGroup:
    """For each key/value head the `queries` query heads that read it, then its k, then its v, of `size` rows each."""

    queries: int
    size: int

    def pieces(self, part: str, start: int, stop: int) -> list[Piece]:
        group = (self.queries + 2) * self.size
        if part == "q":
            places = [divmod(head, self.queries) for head in range(start, stop)]
            return [Piece(g * group + h * self.size, 1, self.size, 0) for g, h in places]
        offset = (self.queries + (part == "v")) * self.size
        return [Piece(start * group + offset, stop - start, self.size, group)]

    def unit(self, part: str) -> int:
        return self.size


@dataclass(frozen=True)
class Fused:
    """One linear with several outputs, whose places among its rows `rows` knows."""

    linear: Linear
    rows: Rows


Projection = Linear | Fused


def linears_of(projections: Sequence[Projection | None]) -> tuple[Linear, ...]:
    """Return the linears behind `projections`, each once, in order."""
    found = [p.linear if isinstance(p, Fused) else p for p in projections if p is not None]
    return tuple(dict.fromkeys(found))
