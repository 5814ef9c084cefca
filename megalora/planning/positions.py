"""What is made of a table of positions that scores read: see megalora.models.blocks.disentangled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.planning.mixers import Attention
from megalora.planning.node import Node
from megalora.planning.tokens import Tokens


def position_nodes(layer: Any, mixer: Attention, after: bool) -> list[Node]:
    """Return the linears that read the table, whose result attention keeps.

    layer  the megalora.planning.nodes._LayerNodes of its layer
    after  whether attention has a gradient
    """
    if mixer.positions is None:
        return []
    ranks = layer.tokens.full // layer.tokens.local
    rows = Tokens.of(layer.shape, layer.work, -(-mixer.rows // ranks) * ranks)
    node = replace(layer, tokens=rows)._linears(mixer.positions, "new", False, read=True)
    made = rows.full * mixer.positions.output * layer.work.element
    return [replace(node, kept=node.kept + made * (after or mixer.positions.trains))]
