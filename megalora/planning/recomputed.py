"""Nodes of what is computed again in backward (megalora.models.recompute), from the nodes of its two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megalora.models.offload import IN_FLIGHT
from megalora.planning.node import Node, Pass, sum_of


@dataclass(frozen=True)
class Run:
    """The nodes of one step of a layer. by_token: it treats every token alone."""

    nodes: list[Node]
    by_token: bool


def part_of(
    first: Sequence[Run], again: Sequence[Run], stream: int, kept: int = 0, offloads: bool = False
) -> list[Node]:
    """Return the node of a part that is computed again, in a list.

    first, again  its steps as forward runs them, and as backward does
    stream        bytes of the residual stream, which is kept
    kept          bytes that are kept besides
    offloads      both are kept in host memory: fetched one layer ahead, and let go of IN_FLIGHT layers late
    """
    inner = [node for run in again for node in run.nodes]
    if len(again) > 1 and again[-1].nodes[0].name == "tiles":
        # What the tiles read, and its gradient, are held until the part's backward is done.
        before = [replace(n, backward=replace(n.backward, live=n.backward.live + 2 * stream)) for n in inner[:-1]]
        inner = [*before, inner[-1]]
    # What the part's first norm keeps is what the part keeps.
    inner[0] = replace(inner[0], kept=inner[0].kept - min(inner[0].kept, stream))
    forward = sum_of(node.forward for run in first for node in run.nodes)
    live = 0
    for run, second in zip(first, again, strict=True):  # forward runs in tiles too
        nodes = second.nodes[0].inner if second.nodes[0].name == "tiles" else run.nodes
        extra = 3 * stream if second.nodes[0].name == "tiles" else 0  # the sum, what is added, what came in
        live = max(live, extra + max(node.forward.live for node in nodes))
    forward = replace(forward, live=live)
    size = stream + kept
    node = again_of("layer", inner, forward, size, stream)
    return [replace(node, kept=0, host=size, fetched=IN_FLIGHT * size) if offloads else node]


def again_of(name: str, inner: Sequence[Node], forward: Pass, kept: int, gradient: int) -> Node:
    """Return the node of what runs again as `inner`, while `gradient` bytes of gradients wait."""
    return Node(name, kept, forward, replace(forward, live=gradient), tuple(inner))


def tiled(run: Run, tile: Run, stream: int) -> Run:
    """Return a step that backward runs in tiles, where it treats every token alone; `tile` has the nodes of one."""
    if not run.by_token:
        return run
    inner = [
        replace(
            whole,
            kept=part.kept,
            forward=replace(whole.forward, live=part.forward.live),
            backward=replace(whole.backward, live=part.backward.live),
        )
        for whole, part in zip(run.nodes, tile.nodes, strict=True)
    ]
    inner[0] = replace(inner[0], kept=0)  # a view of what the tiles are cut from
    enter = Pass(live=stream, traffic=3 * stream, calls=1)
    return Run([Node("tiles", stream, enter, Pass(live=2 * stream), tuple(inner))], True)


def attention_again(run: Run) -> Run:
    """Return a step whose attention is not computed again: its result is there."""

    def without(node: Node) -> Node:
        forward = replace(node.forward, attention=0, attended=0)
        return replace(node, kept=max(0, node.kept - node.result), forward=forward)

    return Run([without(node) if node.result else node for node in run.nodes], run.by_token)
