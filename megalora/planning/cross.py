"""What cross attention computes and keeps: see megalora.models.blocks.cross."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.planning.mixers import CrossAttention
from megalora.planning.node import Node, Pass

_STATISTIC = 4  # bytes of a float32: the logsumexp of attention


def cross_nodes(layer: Any, mixer: CrossAttention, source: str, flowing: bool) -> list[Node]:
    """Return the nodes of one cross attention, whose keys are of the encoder's tokens (`_LayerNodes.memory`).

    layer   the megalora.planning.nodes._LayerNodes of its layer
    source  as `_LayerNodes._linears` takes it
    """
    tokens, e, seen = layer.tokens, layer.work.element, layer.memory
    of_source = replace(layer, tokens=seen)
    memory_flows = layer.work.source_flows
    after = flowing or memory_flows or mixer.q.trains or mixer.kv.trains
    head = mixer.heads * mixer.head_dim * e
    q, kv, statistics = tokens.full * head, seen.full * 2 * head, tokens.full * mixer.heads * _STATISTIC
    key = 4 * mixer.heads * mixer.head_dim * tokens.full
    forward = Pass(q + kv, attention=key * layer.work.memory_seen, attended=key, traffic=2 * (q + kv), calls=4)
    core = layer._node(
        "cross attention",
        2 * q + kv + statistics,
        forward,
        replace(forward, live=tokens.stream + 3 * q + 2 * kv, traffic=4 * q + 2 * kv).of_backward,
        after,
    )
    return [
        layer._linears(mixer.q, source, flowing, read=True),
        of_source._linears(mixer.kv, "kept", memory_flows, read=True),
        replace(core, result=q + statistics),
        layer._linears(mixer.out, "kept" if after else "new", after),
    ]
