"""What latent attention computes and keeps: see megalora.models.blocks.latent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.planning.mixers import LatentAttention
from megalora.planning.node import Message, Node, Pass

_STATISTIC = 4  # bytes of a float32: a norm's inverse, the logsumexp of attention


def latent_nodes(layer: Any, mixer: LatentAttention, source: str, flowing: bool) -> list[Node]:
    """Return the nodes of one latent attention.

    layer   the megalora.planning.nodes._LayerNodes of its layer
    source  as `_LayerNodes._linears` takes it
    """
    tokens, e = layer.tokens, layer.work.element
    own = replace(layer, shape=replace(layer.shape, tp=1), tokens=replace(tokens, full=tokens.local, gathers=False))
    after = flowing or mixer.down.trains
    first, second = (own._linears(mixer.down, "kept" if mixer.direct else source, flowing), [])
    if mixer.direct:
        second = [layer._linears(mixer.q_up, source, flowing)]
    normed = tokens.local * mixer.norms * e
    both = Pass(live=normed, traffic=2 * normed, calls=3)
    norms = layer._node("latent norms", normed + 2 * tokens.local * _STATISTIC, both, both, after)
    if not mixer.direct:
        second = [layer._linears(mixer.q_up, "normed", after)]
    trains = after or mixer.q_up.trains or mixer.kv_up.trains
    return [
        *(second if mixer.direct else ()),
        first,
        norms,
        _turned(layer, mixer, after),
        *(() if mixer.direct else second),
        layer._linears(mixer.kv_up, "normed", after),
        *_core(layer, mixer, trains),
        layer._linears(mixer.out, _context(layer, mixer, trains), trains),
    ]


def _context(layer: Any, mixer: LatentAttention, trains: bool) -> str:
    """Return what `_linears` is to know of the result of attention, of which the zeros behind v are cut off."""
    if not trains or mixer.value < mixer.head_dim:
        return "new"
    return "recomputed" if layer.work.recompute == "selective" else "kept"


def _turned(layer: Any, mixer: LatentAttention, flowing: bool) -> Node:
    """Return the key features that rotate, which all heads share: gathered, and their gradient summed."""
    size = layer.tokens.full * mixer.turned * layer.work.element
    if layer.shape.tp == 1:
        return Node("shared key features", 0, Pass())
    gathers = layer.tokens.gathers
    before = (Message("gather", size),) if gathers else ()
    summed = (Message("scatter" if gathers else "reduce", size),)
    backward = Pass(live=size, messages=summed, calls=1)
    return layer._node("shared key features", 0, Pass(live=size, messages=before, calls=len(before)), backward, flowing)


def _core(layer: Any, mixer: LatentAttention, flowing: bool) -> list[Node]:
    """Count rotation and attention over heads of one width: q and k put together, v with zeros behind it."""
    full, e, work = layer.tokens.full, layer.work.element, layer.work
    width = max(mixer.head_dim, mixer.value)
    head = full * mixer.heads * width * e
    came = full * mixer.heads * (2 * mixer.head_dim - mixer.turned + mixer.value) * e
    kept = 4 * head + full * mixer.heads * _STATISTIC + mixer.tempered * full * e
    key = 4 * mixer.heads * width * full
    flops = key * work.seen(None)
    forward = Pass(live=came, attention=flops, attended=key, traffic=2 * came + 4 * head, calls=10)
    backward = replace(forward, live=layer.tokens.stream + 5 * head, traffic=8 * head, calls=14).of_backward
    core = layer._node("attention", kept, forward, backward, flowing)
    core = replace(core, result=head + full * mixer.heads * _STATISTIC)
    if work.recompute != "selective" or not flowing:
        return [core]
    # The shared key features are kept too: gathered, or as a view of what made them.
    shared = mixer.turned if layer.tokens.gathers else sum(mixer.down.outputs)
    again = replace(forward, live=layer.tokens.stream + head)
    return [Node("attention", came + full * shared * e, forward, again, (core,))]
