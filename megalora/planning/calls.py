"""How attention is called, and what its backward needs: see megalora.ops.attention and megalora.parallel.context."""

from __future__ import annotations

from dataclasses import dataclass

from megalora.ops.attention import LONG_DOCUMENT
from megalora.ops.merged_attention import are_long, heads_at_once
from megalora.planning.mixers import Attention
from megalora.planning.node import Workload


@dataclass(frozen=True)
class Calls:
    """How attention of a layer is called.

    seen       keys that a rank holds for each of its own tokens
    workspace  bytes of the backward kernel, with the gradients that are still to be added up
    """

    seen: float
    workspace: int


def calls_of(layer: Attention, work: Workload, tokens: int, device_type: str) -> Calls:
    """Return the calls of a layer's attention over the `tokens` of a microbatch on this rank."""
    e, cp, dim = work.element, work.context_parallel, layer.head_dim + layer.extra
    seen = 1 if cp == 1 else cp + 0.5  # keys up to each piece instead of this rank's
    if device_type != "cuda":  # ours: in float32 what each query head gives to dk and dv
        return Calls(seen, 2 * tokens * layer.heads * dim * 4)
    parts = 1 if cp == 1 else 2 * cp
    piece = work.seq_length // parts
    plain = layer.causal and layer.window is None and layer.chunk is None and not layer.extra
    plain = plain and work.merges and work.context is None and e == 2
    pieces = [piece] * (work.rows * min(2, parts))
    if plain and are_long(dim, pieces) and (cp > 1 or piece >= LONG_DOCUMENT):
        keys, group = piece * max(1, parts - 1), layer.heads // layer.kv_heads
        heads = heads_at_once(layer.kv_heads, group, dim, piece, keys)
        return Calls(cp, heads * (group * _workspace(layer, piece, keys, e) + dim * e * (group * piece + 2 * keys)))
    return Calls(seen, layer.heads * _workspace(layer, tokens, round(tokens * seen), e))


def _workspace(layer: Attention, queries: int, keys: int, element: int) -> int:
    """Return what one query head needs: dq in float32, and its own dk and dv where several share them."""
    return (layer.head_dim + layer.extra) * (4 * queries + 2 * keys * element * layer.expands)
