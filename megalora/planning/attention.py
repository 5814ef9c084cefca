"""What attention over heads computes and keeps: see megalora.models.blocks.attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megalora.ops import extension
from megalora.planning.calls import calls_of
from megalora.planning.mixers import Attention
from megalora.planning.node import Message, Node, Pass
from megalora.planning.positions import position_nodes
from megalora.planning.recomputed import again_of

_STATISTIC = 4  # bytes of a float32: the norms' inverses, the logsumexp of attention


def attention_nodes(layer: Any, mixer: Attention, source: str, flowing: bool) -> list[Node]:
    """Return the nodes of one attention.

    layer   the megalora.planning.nodes._LayerNodes of its layer
    source  as `_LayerNodes._linears` takes it
    """
    selective = layer.work.recompute == "selective"
    after = flowing or any(group.trains for group in mixer.groups[:1] + mixer.groups[2:])
    # The norms of q and k keep views of q k v, as does attention where nothing rotates; and what is computed again
    # begins with it.
    read = mixer.qk_rows > 0 or mixer.reads_views or selective
    # Of features that carry ALiBi's bias the result is freed: a copy without them is what goes on.
    kept = after and not (mixer.extra or mixer.gated)
    context = "recomputed" if selective and after else "kept" if kept else "new"
    return [
        layer._linears(mixer.qkv, source, flowing, read=read),
        *position_nodes(layer, mixer, after),
        _core(layer, mixer, after),
        layer._linears(mixer.out, context, after),
    ]


def _core(layer: Any, mixer: Attention, flowing: bool) -> Node:
    """Count rotation and attention: q, k, v, the result and its logsumexp; with recompute, q k v as they came."""
    work, tokens, e, device = layer.work, layer.tokens, layer.work.element, layer.shape.device_type
    full, dim = tokens.full, mixer.head_dim + mixer.extra
    gate = full * mixer.heads * mixer.head_dim * e * mixer.gated
    given = full * (mixer.heads + (2 - mixer.v_shared) * mixer.kv_heads) * mixer.head_dim * e + gate
    q, kv = full * mixer.heads * dim * e, full * mixer.kv_heads * dim * e
    qkv, statistics = q + 2 * kv, full * mixer.heads * _STATISTIC
    key = 4 * mixer.heads * dim * full
    flops = key * (work.seen(mixer.window, mixer.chunk, mixer.causal) + mixer.terms * mixer.rows / 2)
    kept = qkv + q + statistics + (given if mixer.clips else 0) + mixer.biases * q + gate
    cp, calls = work.context_parallel, calls_of(mixer, work, full, device)
    shared = (Message("context", 2 * kv * cp, ranks=cp),) if cp > 1 else ()
    kept += round(2 * kv * (calls.seen - 1))  # keys and values up to each piece instead of this rank's
    if mixer.qk_rows:
        # The norms keep what they read, copies of q and k for kernels, else views of qkv; v is a view of qkv.
        # What a rotation before them made is theirs alone.
        copied = mixer.turns_first or (mixer.qk_kernel and (device == "cuda" or extension.has_kernels(device)))
        copies = q + kv if copied else 0
        copies += mixer.qk_stacked * e
        kept += copies + full * mixer.qk_rows * mixer.qk_statistics * _STATISTIC + (qkv - kv)
        if mixer.v_normed:  # a copy of v too, and no view of qkv
            kept += full * mixer.kv_heads * _STATISTIC + (kv - (qkv - kv) if copied else kv)
    if mixer.tempered:  # rotated k is a copy too then, beside qkv, of which v is a view
        kept += q + full * e + (0 if mixer.reads_views or mixer.qk_rows else kv)
    # Norms of heads read and write q and k once more, on a GPU by two kernels.
    normed = (q + kv) * (mixer.qk_rows > 0)
    grads = q + 2 * kv * calls.seen
    gathering = round(2 * kv * (calls.seen + cp)) if cp > 1 else 0
    sums = (Message("reduce", full * _STATISTIC),) * 2 if mixer.qk_across and layer.shape.tp > 1 else ()
    core = layer._node(
        "attention",
        kept,
        Pass(
            live=qkv + gathering,
            attention=flops,
            attended=key,
            traffic=2 * qkv + 2 * normed + 3 * gate,
            messages=sums + shared,
            calls=4 + 2 * (mixer.qk_rows > 0) + 2 * mixer.gated,
        ),
        Pass(
            live=tokens.stream + q + round(max(grads + calls.workspace, grads + gathering, 2 * qkv)),
            attention=flops,
            attended=key,
            traffic=2 * q + 2 * qkv + 3 * normed + 5 * gate,
            messages=sums + shared,
            calls=4 + 2 * (mixer.qk_rows > 0) + 5 * mixer.gated,
        ).of_backward,
        flowing,
    )
    core = replace(core, result=q + statistics)
    if work.recompute != "selective" or not flowing:
        return core
    return again_of("attention", [core], core.forward, given, tokens.stream + q)
