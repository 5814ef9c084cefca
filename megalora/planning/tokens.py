"""How many tokens of a microbatch a rank holds, and the bytes of their residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from megalora.planning.node import Workload
from megalora.planning.shapes import Shape


@dataclass(frozen=True)
class Tokens:
    """local T, full F; stream: bytes of one [T, hidden]; gathers: whether the linears gather their tokens."""

    local: int
    full: int
    stream: int
    whole: int
    gathers: bool

    @classmethod
    def of(cls, shape: Shape, work: Workload, full: int | None = None) -> Tokens:
        """Return the tokens of a microbatch, or `full` of them."""
        gathers, full = work.sequence_parallel and shape.tp > 1, work.tokens if full is None else full
        local, size = full // shape.tp if gathers else full, shape.hidden * work.element
        return cls(local, full, local * size, full * size, gathers)

    def part(self, local: int) -> Tokens:
        """Return `local` tokens of each rank."""
        ranks, size = self.full // self.local, self.stream // self.local
        return Tokens(local, local * ranks, local * size, local * ranks * size, self.gathers)
