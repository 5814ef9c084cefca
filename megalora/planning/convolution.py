"""What gated short convolutions compute and keep: see megalora.models.blocks.convolution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.planning.mixers import GatedConvolution
from megalora.planning.node import Node, Pass

_WIDE = 4  # bytes of a float32, in which all is computed


def convolution_core(layer: Any, mixer: GatedConvolution, flowing: bool) -> Node:
    """Count what stands between the linears: it keeps what it reads, and backward computes the rest again.

    layer  the megalora.planning.nodes._LayerNodes of its layer
    """
    full, work, channels = layer.tokens.full, layer.work, mixer.out.inputs
    given, result = 3 * full * channels * work.element, full * channels * work.element
    wide = full * channels * max(_WIDE, work.element)
    # The output's linear keeps what it reads for its A alone.
    kept = given + (result if mixer.out.rank or work.recompute == "layer" else 0)
    # A step for each token that is read: two that are read, one that is written; and a mask.
    passes = 5 * (mixer.width - 1) + 4
    forward = Pass(live=result + 2 * wide, traffic=given + passes * wide, calls=2 * mixer.width + 3)
    backward = Pass(
        live=layer.tokens.stream + given + result + given + 4 * wide,
        traffic=2 * given + 2 * passes * wide,
        calls=2 * forward.calls + 8,
    )
    return replace(layer._node("short convolution", kept, forward, backward, flowing), result=result)
