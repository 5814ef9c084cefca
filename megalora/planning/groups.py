"""A group of linears in numbers, and what DoRA adds to what it keeps and takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar


@dataclass(frozen=True)
class Group:
    """A megalora.parallel.group.LinearGroup in numbers.

    inputs, outputs  features of the input, and of each linear, on this rank
    ranks            of each linear's adapter, 0 without one
    room             columns behind the input for the branches
    biases           features of biases (0: none); trained_biases, those of them that are trained
    lora_biases      features of biases of B
    magnitudes       features of DoRA's magnitudes
    """

    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    room: int
    row_parallel: bool
    biases: int
    trained_biases: int
    lora_biases: int = 0
    magnitudes: int = 0

    @property
    def output(self) -> int:
        return sum(self.outputs)

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def adapted(self) -> int:
        """How many of the linears carry an adapter."""
        return sum(rank > 0 for rank in self.ranks)

    @property
    def trains(self) -> bool:
        return self.rank > 0 or self.trained_biases > 0

    @property
    def frozen(self) -> int:
        """Elements of the frozen weights and biases."""
        return self.inputs * self.output + self.biases - self.trained_biases

    @property
    def trained(self) -> int:
        """Elements of the adapters and trained biases."""
        pairs = zip(self.ranks, self.outputs, strict=True)
        vectors = self.trained_biases + self.lora_biases + self.magnitudes
        return sum(rank * (self.inputs + out) for rank, out in pairs) + vectors

    @property
    def copies(self) -> int:
        """Elements held beside the parameters in the compute dtype: A of all branches, the room of the matrix (whose
        columns hold s B), the biases."""
        bias = self.output if self.lora_biases else self.biases
        return self.rank * self.inputs + self.room * self.output + bias


N = TypeVar("N", bound=Any)  # a megalora.planning.nodes.Node


def with_factors(node: N, group: Group, tokens: int, element: int, *, keeps: bool) -> N:
    """Return the node of a group's linears with DoRA's factors on its result (megalora.parallel.decomposition).

    tokens  of the result on this rank
    keeps   whether the result is kept for the gradients of magnitudes: where no reader of it keeps it, or a bias is
            added to it
    """
    if not group.magnitudes:
        return node
    y = tokens * group.output * element
    apart = bool(group.biases or group.lora_biases)  # y beside the product as it was
    one, two = node.forward, node.backward
    forward = replace(one, traffic=one.traffic + 2 * y, live=one.live + y * apart, calls=one.calls + 1)
    backward = replace(two, traffic=two.traffic + 3 * y, live=two.live + 2 * y, calls=two.calls + 2)
    return replace(node, kept=node.kept + y * (keeps or apart), forward=forward, backward=backward)
