"""What the router and the experts of one layer compute and keep: see megalora.models.blocks.experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.planning.groups import Group
from megalora.planning.mixers import Experts
from megalora.planning.mlp import fuses
from megalora.planning.node import NOTHING, Node, Pass, Workload
from megalora.planning.quantised import linear_bytes

_WIDE, _INDEX = 4, 8  # bytes of a float32 score, of an int64
# Grouped products on GPUs: their rate, of that of a dense one with as many FLOPs (0.69 to 0.74 with 256 rows an expert
# on an H200, up to 0.96 where the card is at its power cap; benchmarks/experts.py), and the FLOPs in which a byte of a
# weight is read: of few rows an expert, reading the weights is all that takes time. On a CPU an expert's product is a
# dense one.
_GROUPED, _FLOPS_A_BYTE = {"cuda": 0.75}, {"cuda": 200}


def experts_nodes(layer: Any, mixer: Experts, flowing: bool) -> list[Node]:
    """Return the nodes of a mixture of experts: all between one gather and one sum over tp runs over all tokens.

    layer  the megalora.planning.nodes._LayerNodes of its layer
    """
    tokens, shape = layer.tokens, layer.shape
    inner = replace(
        layer,
        shape=replace(shape, tp=1),
        tokens=replace(tokens, local=tokens.full, stream=tokens.whole, gathers=False),
    )
    messages = layer._messages(mixer.router, True, 0.0, True)
    gathers = tuple(replace(message, kind="gather") for message in messages) if tokens.gathers else ()
    sums = Pass(live=tokens.whole, messages=messages, calls=len(messages))
    fetch = Pass(live=tokens.whole if gathers else 0, messages=gathers, calls=len(gathers))
    nodes = [Node("gathered tokens", 0, fetch, sums if flowing else NOTHING)]
    nodes += routed_nodes(mixer, layer.work, tokens.full, shape.device_type, flowing)
    if mixer.shared is not None:
        after = flowing or mixer.shared.up.trains
        fused = fuses(mixer.shared, shape.device_type)
        nodes += [
            inner._linears(mixer.shared.up, "kept", flowing, fused=fused),
            inner._linears(mixer.shared.down, "gated", after, fused=fused),
        ]
    if mixer.gate is not None:
        kept = tokens.whole + 2 * tokens.full * layer.work.element
        product = Pass(live=tokens.whole, traffic=3 * tokens.whole, calls=3)
        nodes += [inner._linears(mixer.gate, "kept", flowing)]
        nodes += [inner._node("shared gate", kept, product, product, flowing or mixer.trains)]
    return [*nodes, Node("sum of experts", 0, sums, fetch if flowing or mixer.trains else NOTHING)]


def routed_nodes(mixer: Experts, work: Workload, tokens: int, device_type: str, flowing: bool) -> list[Node]:
    """Return the nodes of the router and of the rank's experts; flowing: their input requires a gradient.

    tokens  F, all of the microbatch; the rank's experts take their even share of the pairs. On a GPU
            every pair has a row, whatever the rank
    """
    rows = mixer.rows(tokens)
    held = tokens * mixer.top if device_type == "cuda" else rows
    return [_router(mixer, work, tokens, flowing), _pair(mixer, work, tokens, rows, held, device_type, flowing)]


def _router(mixer: Experts, work: Workload, tokens: int, flowing: bool) -> Node:
    """Count a router: scores, weights and choices are kept, the input once more where it is read in float32 for an
    adapter.
    """
    group, wide = mixer.router, max(_WIDE, work.element)
    e = wide if mixer.wide else work.element
    scores, chosen = tokens * mixer.count * wide, tokens * mixer.top
    copied = tokens * group.inputs * e if mixer.wide and group.rank else 0
    kept = copied + (tokens * group.room * e if group.rank else 0) + scores + chosen * (_INDEX + 2 * wide)
    product = 2 * tokens * (group.inputs + group.room) * group.output
    read = tokens * group.inputs * e
    forward = Pass(live=3 * scores, traffic=read + 8 * scores, calls=12)
    backward = Pass(live=2 * scores + read, traffic=2 * read, calls=8)
    if mixer.wide:
        forward, backward = replace(forward, flops32=product), replace(backward, flops32=product)
    else:
        forward, backward = replace(forward, flops=product), replace(backward, flops=product)
    return Node("router", kept, forward, backward) if flowing or group.trains else Node("router", 0, forward)


def _pair(mixer: Experts, work: Workload, tokens: int, rows: int, held: int, device_type: str, flowing: bool) -> Node:
    """Count a pair: x, gate_up, both z and where each row comes from are kept; the rest is made again."""
    up, down, e = mixer.up, mixer.down, work.element
    trains = up.trains or down.trains
    x, inner = held * up.inputs * e, held * down.inputs * e
    kept = tokens * up.inputs * e + held * (up.output + up.room + down.room) * e + 2 * _INDEX * held
    kept += 0 if held == rows else tokens * mixer.top * (_INDEX + 1)
    out = tokens * up.inputs * e

    rate = _GROUPED.get(device_type, 1.0)

    def product(group: Group) -> float:
        weight = (group.inputs + group.room) * group.output
        return max(2 * rows * weight / rate, _FLOPS_A_BYTE.get(device_type, 0) * mixer.held * weight * e)

    def branch(group: Group) -> float:
        return 2 * rows * group.rank * group.inputs / rate

    flops = product(up) + product(down) + branch(up) + branch(down)
    decoded = 0
    if work.base_format != "dense" and device_type == "cuda":  # all experts' weights before each product
        decoded = mixer.held * sum(
            linear_bytes(group, work.base_format, e) + (group.inputs + 2 * group.room) * group.output * e
            for group in (up, down)
        )
    forward = Pass(
        live=max(x + held * up.room * e + held * up.output * e, 2 * inner + x) + out,
        flops=flops,
        traffic=4 * x + 6 * inner + decoded,
        calls=20,
    )
    if not (flowing or trains):
        return Node("experts", 0, forward)
    grads = 2 * rows * (up.rank * (up.inputs + up.output / 2) + down.rank * (down.inputs + down.output))
    backward = Pass(
        live=out + 2 * x + 4 * inner + mixer.held * (up.trained + down.trained) * (e + _WIDE),
        flops=flops + grads / rate,
        traffic=7 * x + 15 * inner + decoded,
        calls=40,
    )
    return Node("experts", kept, forward, backward if flowing or trains else NOTHING)
