"""What an MLP computes and keeps: see megalora.models.blocks.mlp."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.ops.activations import KEEPS_RESULT, work_of
from megalora.ops.lora_backward import fuses_gated
from megalora.planning.mixers import MLP
from megalora.planning.node import Node, Pass


def mlp_nodes(layer: Any, mixer: MLP, source: str, flowing: bool, unread: bool) -> list[Node]:
    """Return the nodes of one MLP.

    layer           the megalora.planning.nodes._LayerNodes of its layer
    source, unread  as `_LayerNodes._linears` takes them; unread is of down
    """
    after = flowing or mixer.up.trains
    if mixer.fused:
        fused = fuses(mixer, layer.shape.device_type)
        down = layer._linears(mixer.down, "gated" if mixer.gates else "activated", after, fused=fused, unread=unread)
        if source == "made again":  # both groups' backward is one node, which begins with what it kept
            x = layer.tokens.local * (mixer.up.inputs + mixer.up.room) * layer.work.element
            down = replace(down, backward=replace(down.backward, live=down.backward.live + x))
        return [layer._linears(mixer.up, source, flowing, fused=fused, read=True), down]
    # Some keep their result, which down reads; the others keep what they read, and what is gated both gate and up.
    inner = layer.tokens.full * mixer.down.inputs * layer.work.element
    kept = 2 * inner if mixer.gates else inner * (mixer.act != "linear")
    first, second = work_of(mixer.act, mixer.gates, layer.shape.device_type)
    forward = Pass(live=inner, traffic=first.tensors * inner, calls=first.calls)
    backward = Pass(live=inner + kept, traffic=second.tensors * inner, calls=second.calls)
    act = layer._node("activation", kept, forward, backward, after)
    read = "kept" if mixer.act in KEEPS_RESULT and not mixer.gates and after else "new"
    up = layer._linears(mixer.up, source, flowing, read=kept > 0 and (mixer.gates or mixer.act not in KEEPS_RESULT))
    return [up, act, layer._linears(mixer.down, read, after, unread=unread)]


def fuses(mixer: MLP, device_type: str) -> bool:
    """Return whether the backward passes of down's branch, of what it reads and of gate's and up's B are one."""
    down, ups = mixer.down, [rank for rank in mixer.up.ranks if rank]
    whole = len(ups) in (0, len(mixer.up.ranks))
    return down.rank > 0 and whole and fuses_gated(device_type, down.rank, ups)
