"""What Mamba-2 computes and keeps: see megalora.models.blocks.mamba."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.ops.delta_rule import CHUNK
from megalora.ops.mamba_mixer import MOST_ROWS
from megalora.planning.mixers import StateSpace
from megalora.planning.node import Node, Pass

_WIDE = 4  # bytes of a float32, in which all is computed


def mamba_core(layer: Any, mixer: StateSpace, flowing: bool) -> Node:
    """Count what stands between the linears: it keeps what it reads, and of a norm its result too; backward computes
    the rest again.

    layer  the megalora.planning.nodes._LayerNodes of its layer
    """
    full, work, heads = layer.tokens.full, layer.work, mixer.heads
    given, result = full * mixer.inputs.output * work.element, full * heads * mixer.features * work.element
    wide = max(_WIDE, work.element)
    # The output's linear keeps what it reads for its A alone.
    lengths = full * mixer.groups_read * wide if mixer.normed else 0  # 1 / rms of each group
    kept = given + (result if mixer.out.rank or mixer.normed or work.recompute == "layer" else 0) + lengths
    made = _made(mixer)
    at_once = made * min(full * heads, max(MOST_ROWS, full))
    # What the norm reads, and its gradient, beside some heads at a time.
    whole = full * heads * mixer.features * wide if full * heads > MOST_ROWS else 0
    products = full * heads * _products(mixer)
    flops = {"flops32": products} if work.element == 2 else {"flops": products}
    depth = -(-work.seq_length // CHUNK)
    forward = Pass(live=result + whole + at_once // 2, traffic=3 * full * heads * made, calls=70 + depth, **flops)
    again = {name: 3 * count for name, count in flops.items()}  # once more, and two products for each
    backward = Pass(
        live=layer.tokens.stream + given + result + whole + at_once,
        traffic=3 * forward.traffic,
        calls=3 * forward.calls,
        **again,
    )
    return replace(layer._node("state space", kept, forward, backward, flowing), result=result + lengths)


def _made(mixer: StateSpace) -> int:
    """Return the bytes that backward holds at once of each token and head, forward half of them: as measured
    (tests/planning/test_mamba.py)."""
    share = 2 * mixer.state * mixer.groups_read / mixer.heads  # of b and c
    of_states = mixer.features * mixer.state / CHUNK
    return round((12.7 * mixer.features + 4.1 * share + 3.6 * CHUNK + 4.3 * of_states) * _WIDE)


def _products(mixer: StateSpace) -> float:
    """Return the FLOPs of the products of one token of a head (see megalora.ops.state_space)."""
    within = 2 * CHUNK * mixer.features + 2 * CHUNK * mixer.state * mixer.groups_read / mixer.heads + 2 * CHUNK * CHUNK
    return within + 4 * mixer.state * mixer.features
