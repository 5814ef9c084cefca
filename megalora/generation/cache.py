"""Keys and values of the tokens seen so far: one slot a sequence, sequences of any lengths side by side.

A step feeds new tokens of several sequences, flattened one after another (no padding), as in training: whole prompts
(PrefillStep), or one token each (DecodeStep).

    PrefillStep  [ prompt of A ......... | prompt of B .... ]
    DecodeStep   [ A | B | C ]
    slot of A    [ prompt of A ......... reply of A ...     ]
    slot of B    [ prompt of B .... reply of B ......       ]

Legend: F tokens of the step, H query heads and K key/value heads of this rank, D head_dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from megalora.ops.attention import PLAIN, Packed, Scores, attention, cached_attention, in_chunks, pack
from megalora.ops.cross_attention import Crossing, cross_attention
from megalora.ops.decode_attention import decode_attention


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence: they take the places [start, stop) of `slot`."""

    slot: int
    start: int
    stop: int


def _cut(span: Span, chunk: int) -> list[Span]:
    """Return the parts of new tokens that lie in one chunk each."""
    edges = range(span.start - span.start % chunk + chunk, span.stop, chunk)
    return [Span(span.slot, a, b) for a, b in itertools.pairwise((span.start, *edges, span.stop))]


class KVCache:
    """`slots` sequences of up to `capacity` tokens.

    A layer's keys and values, [slots, K, capacity, D] each, are allocated once, at its first step: the layer knows
    how many heads it holds. Of an encoder-decoder each slot has a source too, of up to `source_capacity` tokens:
    `source_lengths` [slots] int64 says of how many.
    """

    def __init__(self, slots: int, capacity: int, source_capacity: int = 0, device: torch.device | str = "cpu"):
        self.slots, self.capacity, self.source_capacity = slots, capacity, source_capacity
        self.source_lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sources: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep_sources(
        self, index: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Keep a layer's keys and values k, v [G, H, D] of sources: each token's slot and place [G]."""
        if index not in self._sources:
            shape = (self.slots, k.shape[1], self.source_capacity, k.shape[2])
            self._sources[index] = k.new_zeros(shape), v.new_zeros(shape)
        for kept, new in zip(self._sources[index], (k, v), strict=True):
            kept[slots, :, places] = new

    def attend_sources(self, index: int, q: torch.Tensor, slots: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the attention [B, H, D] of one query each, q [B, H, D], to the sources in `slots` [B]."""
        lengths = self.source_lengths[slots]
        longest = int(lengths.max())
        seen = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]
        keys, values = (kept[slots, :, :longest] for kept in self._sources[index])
        return scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=seen, scale=scale).squeeze(2)

    def layer(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (keys, values) of a layer, with the heads, dtype and device of k [F, K, D]; one memory where k is v.
        """
        if index not in self._layers:
            shape = (self.slots, k.shape[1], self.capacity, k.shape[2])
            keys = k.new_empty(shape)
            self._layers[index] = (keys, keys if k is v else k.new_empty(shape))
        return self._layers[index]


@dataclass(frozen=True)
class NewSources:
    """The sources of new sequences, one after another. slots, places [G] int64: where their tokens go; bounds: in G."""

    slots: torch.Tensor
    places: torch.Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, slots: Sequence[int], lengths: Sequence[int], device: torch.device) -> NewSources:
        """Build for sources of these lengths in these slots."""
        of_tokens = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))
        places = torch.cat([torch.arange(length) for length in lengths])
        return cls(of_tokens.to(device), places.to(device), tuple(itertools.accumulate(lengths, initial=0)))


@dataclass(frozen=True)
class PrefillStep:
    """Several tokens of each sequence over a KVCache: the `models.inputs.Cache` that the layers read.

    spans   in the order of the tokens; a sequence may go on from tokens that the cache holds
    slots, places   [F] int64: the same token by token
    bounds          cumulative bounds of the spans in F
    packed          the same for kernels that read them on the device, where some do
    sources         of an encoder-decoder: those of the sequences
    """

    cache: KVCache
    spans: Sequence[Span]
    slots: torch.Tensor
    places: torch.Tensor
    bounds: tuple[int, ...]
    packed: Packed | None
    sources: NewSources | None = None

    @classmethod
    def of(
        cls, cache: KVCache, spans: Sequence[Span], head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> PrefillStep:
        """Build the step of layers with this head_dim, dtype and device."""
        lengths = [span.stop - span.start for span in spans]
        bounds = tuple(itertools.accumulate(lengths, initial=0))
        slots = torch.tensor([span.slot for span in spans]).repeat_interleave(torch.tensor(lengths))
        places = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        return cls(cache, spans, slots.to(device), places.to(device), bounds, pack(bounds, head_dim, dtype, device))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
        scores: Scores = PLAIN,
        chunk: int | None = None,
    ) -> torch.Tensor:
        """Keep k, v [F, K, D] of the new tokens of `layer`; return attention of q [F, H, D] over all tokens kept."""
        keys, values = self.cache.layer(layer, k, v)
        keys[self.slots, :, self.places] = k
        if values is not keys:
            values[self.slots, :, self.places] = v
        if all(span.start == 0 for span in self.spans):
            bounds = self.bounds if chunk is None else in_chunks(self.bounds, chunk)
            packed = self.packed if bounds == self.bounds else self.repacked(bounds, q)
            return attention(q, k, v, bounds, window, packed, scores)
        outputs = []
        spans = self.spans if chunk is None else [part for span in self.spans for part in _cut(span, chunk)]
        ends = itertools.accumulate((span.stop - span.start for span in spans), initial=0)
        for span, (begin, end) in zip(spans, itertools.pairwise(ends), strict=True):
            # What the window, or the chunk, of the first new token does not reach, none of them sees.
            first = 0 if window is None else max(0, span.start + 1 - window)
            first = first if chunk is None else max(first, span.start - span.start % chunk)
            seen = slice(first, span.stop)
            k_seen, v_seen = (x[span.slot, :, seen].transpose(0, 1) for x in (keys, values))
            outputs.append(cached_attention(q[begin:end], k_seen, v_seen, window, scores))
        return torch.cat(outputs)

    @staticmethod
    def repacked(bounds: Sequence[int], q: torch.Tensor) -> Packed | None:
        """Return `packed` for other bounds, of heads as q [F, H, D] has them."""
        return pack(bounds, q.shape[2], q.dtype, q.device)

    def cross(
        self, layer: int, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Keep k, v [G, H, D] of the sources; return the attention of q [F, H, D] to the source of each sequence."""
        assert self.sources is not None and k is not None and v is not None
        self.cache.keep_sources(layer, k, v, self.sources.slots, self.sources.places)
        return cross_attention(q, k, v, Crossing(self.bounds, self.sources.bounds), scale)


@dataclass(frozen=True)
class DecodeStep:
    """One token of each sequence over a KVCache, as PrefillStep. slots, positions [F] int64: where the tokens go."""

    cache: KVCache
    slots: torch.Tensor
    positions: torch.Tensor

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
        scores: Scores = PLAIN,
        chunk: int | None = None,
    ) -> torch.Tensor:
        """Do as PrefillStep.attend."""
        cached = self.cache.layer(layer, k, v)
        if chunk is not None and self.last < chunk:  # all are in their first chunk
            chunk = None
        return decode_attention(q, k, v, *cached, self.slots, self.positions, window, scores, chunk)

    @functools.cached_property
    def last(self) -> int:
        """The greatest position of a token. Waits for the device."""
        return int(self.positions.max())

    def cross(
        self, layer: int, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Return as PrefillStep.cross, to the sources that are kept."""
        assert k is None and v is None
        return self.cache.attend_sources(layer, q, self.slots, scale)
