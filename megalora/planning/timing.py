"""Seconds of what a stage does for one microbatch, from what its nodes take and what a device does in a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megalora.planning.devices import Device
from megalora.planning.nodes import Node, Pass, Workload, chunk_nodes
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
    """Of passes one after another: the device's time or the host's, whichever is more, and the messages."""
    passes = list(passes)
    rate = device.gemm if element == 2 else device.gemm32
    computed = sum(p.flops / rate + p.attention / device.attention + p.traffic / device.memory for p in passes)
    computed *= 1 + (device.meeting if tp > 1 else 0)
    issued = sum(p.calls for p in passes) * device.call
    reduced = sum(reduce_seconds(size, tp, device.collective, device) for p in passes for size in p.reduced)
    return max(computed, issued) + reduced + sum(exchange_seconds(p, device, rate, tp) for p in passes)


def reduce_seconds(size: int, ranks: int, speed: float, device: Device) -> float:
    """An all-reduce of `size` bytes by rings: 2 (n - 1) / n of it."""
    return 0.0 if ranks == 1 else device.latency + 2 * (ranks - 1) / ranks * size / speed


def exchange_seconds(p: Pass, device: Device, rate: float, ranks: int) -> float:
    """What gathers and scatters of a pass add to its products: each sends (n - 1) / n of the activation.

    GPUs send beside the product of a rank's own tokens, 1 / n of it (see megalora.parallel.exchange).
    """
    if not p.exchanged:
        return 0.0
    beside = p.flops / rate / ranks / len(p.exchanged) if device.overlaps else 0.0
    speed = device.link if device.overlaps else device.collective
    return sum(device.latency + max(0.0, (ranks - 1) / ranks * size / speed - beside) for size in p.exchanged)


def node_seconds(nodes: Sequence[Node], device: Device, element: int, tp: int) -> Seconds:
    """Of the nodes of one chunk."""
    again, backward = [], []
    for node in nodes:
        if node.inner:
            again += [inner.forward for inner in node.inner]
            backward += [inner.backward for inner in node.inner]
        else:
            backward.append(node.backward)
    return Seconds(
        pass_seconds((node.forward for node in nodes), device, element, tp),
        pass_seconds(again, device, element, tp),
        pass_seconds(backward, device, element, tp),
    )


def chunk_seconds(shape: Shape, layers: range, work: Workload, device: Device, *, first: bool, last: bool) -> Seconds:
    """Of one microbatch in the chunk that holds `layers`."""
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
        """The part of all seconds that falls to each stage (or chunk)."""
        seconds = [sum(self.layers[i] for i in part) for part in parts]
        seconds[0] += self.first
        seconds[-1] += self.last
        whole = sum(seconds)
        return [one / whole for one in seconds]


def layer_costs(shape: Shape, work: Workload, device: Device) -> LayerCosts:
    """What each layer of the model takes, the floor counted: backward and recompute only from the lowest adapter on."""
    count = len(shape.layers)

    def seconds(layers: range, first: bool, last: bool) -> float:
        nodes = chunk_nodes(shape, layers, work, first=first, last=last)
        return node_seconds(nodes, device, work.element, shape.tp).total

    middle = [seconds(range(i, i + 1), False, False) for i in range(count)]
    first = seconds(range(0, 1), True, False) - middle[0]
    last = seconds(range(count - 1, count), False, True) - middle[-1]
    return LayerCosts(tuple(middle), first, last)
