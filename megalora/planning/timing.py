"""Seconds of what a stage does for one microbatch, from what its nodes take and what a device does in a second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megalora.models.spec import ModelSpec
from megalora.pipeline.partition import partition
from megalora.planning.devices import Device
from megalora.planning.nodes import Message, Node, Pass, Workload, chunk_nodes
from megalora.planning.shapes import Shape


@dataclass(frozen=True)
class Seconds:
    """Of one microbatch in one chunk. `backward` does not count what is computed again before it."""

    forward: float
    recompute: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.recompute + self.backward


def pass_seconds(passes: Iterable[Pass], device: Device, element: int, tp: int) -> float:
    """Return the seconds of passes one after another: the device's time or the host's, whichever is more, and the
    messages.
    """
    passes = list(passes)
    rate = device.gemm if element == 2 else device.gemm32
    products = sum(p.flops / rate + p.flops8 / (device.gemm8 or rate) + p.flops32 / device.gemm32 for p in passes)
    attention = sum(device.attention_seconds(p.attention, p.attended) for p in passes)
    computed = products + attention + sum(p.traffic for p in passes) / device.memory
    calls = sum(p.calls for p in passes)
    computed += (calls - sum(len(p.messages) for p in passes)) * device.kernel  # a message has its own latency
    computed *= 1 + (device.meeting if tp > 1 else 0)
    issued = calls * device.call
    messages = (message for p in passes for message in p.messages)
    return max(computed, issued) + sum(message_seconds(message, device, rate, tp) for message in messages)


def reduce_seconds(size: int, ranks: int, speed: float, device: Device) -> float:
    """Return the seconds of an all-reduce of `size` bytes by rings: 2 (n - 1) / n of it."""
    return 0.0 if ranks == 1 else device.latency + 2 * (ranks - 1) / ranks * size / speed


def message_seconds(message: Message, device: Device, rate: float, ranks: int) -> float:
    """Return what a message between `ranks` tensor-parallel ranks adds, or a "context" one between its own.

    rate: FLOPs a second of a product.

    A gather or scatter sends (n - 1) / n of the activation: beside the product of a rank's own tokens, 1 / n of it,
    where the device does that (see megalora.parallel.exchange). The terms of a scatter are then summed from memory.
    """
    if message.kind == "context":  # by NCCL, and nothing runs beside it
        sent = (message.ranks - 1) / message.ranks * message.size
        return device.latency + sent / (device.context or device.collective)
    if message.kind == "reduce":
        return reduce_seconds(message.size, ranks, device.collective, device)
    sent = (ranks - 1) / ranks * message.size
    if not (device.overlaps and message.beside):
        return device.latency + sent / device.collective
    summed = (ranks + 1) / ranks * message.size / device.memory if message.kind == "scatter" else 0.0
    return device.latency + max(0.0, sent / device.link - message.beside / rate / ranks) + summed


def node_seconds(nodes: Sequence[Node], device: Device, element: int, tp: int) -> Seconds:
    """Return the seconds of the nodes of one chunk."""
    forward = [node.forward for node in nodes]
    again = [part for node in nodes for part in _second(node)]
    backward = [leaf.backward for node in nodes for leaf in _leaves(node)]
    return Seconds(
        pass_seconds(forward, device, element, tp),
        pass_seconds(again, device, element, tp),
        pass_seconds(backward, device, element, tp),
    )


def _second(node: Node) -> list[Pass]:
    """Return what is computed for the second time before the node's backward."""
    return [again for part in node.inner for again in (_second(part) if part.inner else [part.forward])]


def _leaves(node: Node) -> list[Node]:
    return [leaf for part in node.inner for leaf in _leaves(part)] if node.inner else [node]


def chunk_seconds(shape: Shape, layers: range, work: Workload, device: Device, *, first: bool, last: bool) -> Seconds:
    """Return the seconds of one microbatch in the chunk that holds `layers`."""
    nodes = chunk_nodes(shape, layers, work, first=first, last=last)
    return node_seconds(nodes, device, work.element, shape.tp)


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of one microbatch, forward and backward and what is computed again, for `partition_method cost`.

    layers  of each layer; first, last  of the embedding, and of the final norm and the head with the loss
    """

    layers: tuple[float, ...]
    first: float
    last: float

    def shares(self, parts: Sequence[range]) -> list[float]:
        """Return the part of all seconds that falls to each stage (or chunk)."""
        seconds = [sum(self.layers[i] for i in part) for part in parts]
        seconds[0] += self.first
        seconds[-1] += self.last
        whole = sum(seconds)
        return [one / whole for one in seconds]


def cut_layers(
    config: ModelSpec,
    method: str,
    parts: int,
    costs: LayerCosts | None = None,
    custom: tuple[int, ...] | None = None,
) -> list[range]:
    """Return the layers of each of `parts` stages (or chunks of stages). Raises UserError as `partition`.

    costs  for method cost, which needs them
    """
    if method == "cost":
        assert costs is not None
        return partition(method, costs.layers, parts, first_cost=costs.first, last_cost=costs.last, custom=custom)
    words = math.prod(config.tensors[config.embedding.weight])
    return partition(method, config.layer_sizes, parts, first_cost=words, last_cost=words, custom=custom)


def layer_costs(shape: Shape, work: Workload, device: Device) -> LayerCosts:
    """Return what each layer of the model takes, the floor counted: backward and recompute only from the lowest adapter
    on.
    """
    count = len(shape.layers)

    def seconds(layers: range, first: bool, last: bool) -> float:
        nodes = chunk_nodes(shape, layers, work, first=first, last=last)
        return node_seconds(nodes, device, work.element, shape.tp).total

    middle = [seconds(range(i, i + 1), False, False) for i in range(count)]
    first = seconds(range(0, 1), True, False) - middle[0]
    last = seconds(range(count - 1, count), False, True) - middle[-1]
    return LayerCosts(tuple(middle), first, last)
