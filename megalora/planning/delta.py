"""What linear attention by the gated delta rule computes and keeps: see megalora.models.blocks.delta."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.ops import fused_delta
from megalora.ops.delta_mixer import MOST_ROWS
from megalora.ops.delta_rule import CHUNK
from megalora.planning.mixers import DeltaAttention
from megalora.planning.node import Node, Pass

_WIDE = 4  # bytes of a float32, in which plain torch computes all
_NARROW = 2  # of what kernels keep, in bfloat16
# Passes of kernels over what they make, by the time that they take beside products and launches: far from all of it is
# traffic. Fitted to Qwen3.5-9B and 27B on an H200, 4,096 and 16,384 tokens.
_PASSES, _PASSES_BACK = 6.5, 8.2


def delta_core(layer: Any, mixer: DeltaAttention, flowing: bool) -> Node:
    """Count what stands between the linears: it keeps what it reads, and backward computes the rest again.

    layer  the megalora.planning.nodes._LayerNodes of its layer
    """
    full, work, heads = layer.tokens.full, layer.work, mixer.key_heads * mixer.repeats
    given, result = full * mixer.inputs.output * work.element, full * heads * mixer.value * work.element
    # The output's linear keeps what it reads for its A alone.
    kept = given + (result if mixer.out.rank or work.recompute == "layer" else 0)
    products = full * heads * _products(mixer)
    if layer.shape.device_type == "cuda" and work.element == _NARROW and (mixer.key, mixer.value) in fused_delta.TAKEN:
        first, whole = _made_by_kernels(mixer)
        rows = min(full * heads, max(fused_delta.MOST_ROWS, full * mixer.repeats))
        forward = Pass(live=result + first * rows, traffic=_PASSES * full * heads * first, calls=4, flops=products)
        backward = Pass(
            live=layer.tokens.stream + given + result + whole * rows,
            traffic=_PASSES_BACK * full * heads * whole,
            calls=9,
            flops=3 * products,
        )
        return replace(layer._node("linear attention", kept, forward, backward, flowing), result=result)
    made = _made(mixer)
    at_once = made * min(full * heads, max(MOST_ROWS, full * mixer.repeats))
    flops = {"flops32": products} if work.element == 2 else {"flops": products}
    depth = -(-work.seq_length // CHUNK)
    forward = Pass(live=result + at_once // 2, traffic=3 * full * heads * made, calls=100 + depth, **flops)
    again = {name: 3 * count for name, count in flops.items()}  # once more, and two products for each
    backward = Pass(
        live=layer.tokens.stream + given + result + at_once,
        traffic=3 * forward.traffic,
        calls=3 * forward.calls,
        **again,
    )
    return replace(layer._node("linear attention", kept, forward, backward, flowing), result=result)


def _made(mixer: DeltaAttention) -> int:
    """Return the bytes that backward holds at once of each token and value head, forward half of them: as measured
    (tests/planning/test_delta.py)."""
    key, value = mixer.key, mixer.value
    of_channels, of_heads, of_chunks = 2 * key / mixer.repeats + value, key + value, CHUNK
    of_states = key * (2.4 * value + 2.1 * key) / CHUNK
    return round((3.3 * of_channels + 6 * of_heads + 4.7 * of_chunks + of_states) * _WIDE)


def _made_by_kernels(mixer: DeltaAttention) -> tuple[int, int]:
    """Return the bytes that kernels hold at once of each token and value head, forward and backward (see
    megalora.ops.fused_delta)."""
    key, value = mixer.key, mixer.value
    qkv, states = 2 * key / mixer.repeats + value, key * value / CHUNK
    forward = _NARROW * (qkv + value + key + states) + 3 * _WIDE
    backward = _NARROW * (2 * qkv + 3 * value + 3 * CHUNK + 2 * states) + 5 * _WIDE
    return round(forward), round(backward)


def _products(mixer: DeltaAttention) -> float:
    """Return the FLOPs of the products of one token of a value head (see megalora.ops.delta_rule)."""
    key, value = mixer.key, mixer.value
    of_keys = 4 * CHUNK * key / mixer.repeats
    within = 3 * CHUNK * CHUNK + 2 * CHUNK * (key + value) + 2 * CHUNK * value
    across = 2 * key * (key + value) + 2 * key * key * value / CHUNK + 4 * key * value
    return of_keys + within + across
