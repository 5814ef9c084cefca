"""Keys and values of the tokens seen so far: one slot a sequence, sequences of any lengths side by side.

A step feeds new tokens of several sequences, flattened one after another (no padding), as in training:

    tokens of the step   [ prompt of A ......... | B | C ]        A starts, B and C go on with one token each
    slot of A            [ prompt of A .........             ]
    slot of B            [ earlier tokens of B ....... B     ]

Legend: F tokens of the step, H query heads and K key/value heads of this rank, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalora.ops.attention import cached_attention


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence: they take the positions [start, stop) of `slot`."""

    slot: int
    start: int
    stop: int


class KVCache:
    """`slots` sequences of up to `capacity` tokens.

    A layer's keys and values, [slots, capacity, K, D] each, are allocated once, at its first step: the layer knows
    how many heads it holds.
    """

    def __init__(self, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of a layer, with the heads, dtype and device of `like` [F, K, D]."""
        if index not in self._layers:
            shape = (self.slots, self.capacity, *like.shape[1:])
            self._layers[index] = (like.new_empty(shape), like.new_empty(shape))
        return self._layers[index]


@dataclass(frozen=True)
class CachedStep:
    """One step over a KVCache: the `models.inputs.Cache` that its layers read. spans, in the order of the tokens."""

    cache: KVCache
    spans: Sequence[Span]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """Keeps k, v [F, K, D] of the new tokens of `layer`; attention of q [F, H, D] over all tokens kept."""
        keys, values = self.cache.layer(layer, k)
        lengths = [span.stop - span.start for span in self.spans]
        outputs = []
        for span, q_new, k_new, v_new in zip(
            self.spans, q.split(lengths), k.split(lengths), v.split(lengths), strict=True
        ):
            keys[span.slot, span.start : span.stop] = k_new
            values[span.slot, span.start : span.stop] = v_new
            # What the window of the first new token does not reach, none of them sees.
            first = 0 if window is None else max(0, span.start + 1 - window)
            seen = slice(first, span.stop)
            outputs.append(cached_attention(q_new, keys[span.slot, seen], values[span.slot, seen], window))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
