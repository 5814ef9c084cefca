"""Keys and values of the tokens seen so far, or the states that they left: one slot a sequence, sequences of any
lengths side by side.

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

from megalora.batch import to_device
from megalora.models.inputs import Angles, Recurrent, States
from megalora.ops.attention import PLAIN, Packed, Scores, attention, cached_attention, in_chunks, pack
from megalora.ops.cross_attention import Crossing, cross_attention
from megalora.ops.decode_attention import decode_attention, kept_attention, turns
from megalora.ops.delta_rule import Documents
from megalora.ops.fp8_cache import decode_heads, encode_heads, scales_of


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


class Dense:
    """Keys or values of one layer in the compute dtype: `whole` [slots, K, capacity, D], like x [F, K, D]."""

    def __init__(self, slots: int, capacity: int, x: torch.Tensor):
        self.whole = x.new_empty(slots, x.shape[1], capacity, x.shape[2])

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes

    def put(self, slots: torch.Tensor, places: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Keep x [F, K, D] at places [F] of slots [F]; return it as it is kept."""
        self.whole[slots, :, places] = x
        return x

    def of(self, slots: torch.Tensor | int, places: slice) -> torch.Tensor:
        """Return what is kept at these places of one slot, [K, n, D], or of several, [B, K, n, D]."""
        return self.whole[slots, :, places]


class Fp8:
    """As Dense, in 8 bits (megalora.ops.fp8_cache): what is kept is rounded, for the step that keeps it too."""

    def __init__(self, slots: int, capacity: int, x: torch.Tensor):
        heads, features = x.shape[1:]
        self._codes = x.new_empty(slots, heads, capacity, features, dtype=torch.uint8)
        self._scales = x.new_empty(slots, heads, capacity, scales_of(features), dtype=torch.float32)
        self._dtype = x.dtype

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def put(self, slots: torch.Tensor, places: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Do as Dense.put."""
        codes, scales = encode_heads(x)
        self._codes[slots, :, places], self._scales[slots, :, places] = codes, scales
        return decode_heads(codes, scales, self._dtype)

    def of(self, slots: torch.Tensor | int, places: slice) -> torch.Tensor:
        """Do as Dense.of."""
        return decode_heads(self._codes[slots, :, places], self._scales[slots, :, places], self._dtype)


Kept = Dense | Fp8


class KVCache:
    """`slots` sequences of up to `capacity` tokens, in the compute dtype or in 8 bits (fp8).

    A layer's keys and values, [slots, K, capacity, D] each, are allocated once, at its first step: the layer knows
    how many heads it holds. Of an encoder-decoder each slot has a source too, of up to `source_capacity` tokens:
    `source_lengths` [slots] int64 says of how many. `idle` is the slot of rows without a sequence, or None.
    """

    def __init__(
        self,
        slots: int,
        capacity: int,
        source_capacity: int = 0,
        device: torch.device | str = "cpu",
        fp8: bool = False,
        idle: int | None = None,
    ):
        self.idle = idle
        self.slots, self.capacity, self.source_capacity = slots, capacity, source_capacity
        self.source_lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self._kind = Fp8 if fp8 else Dense
        self._layers: dict[int, tuple[Kept, Kept]] = {}
        self._sources: dict[int, tuple[Kept, Kept]] = {}
        self._states: dict[int, States] = {}
        self._arrived: torch.Tensor | None = None

    @property
    def is_dense(self) -> bool:
        """Whether keys and values are in the compute dtype."""
        return self._kind is Dense

    def arrived(self, k: torch.Tensor) -> torch.Tensor | None:
        """Return the zeros that decode_attention counts in, for keys like k [F, K, D] of a step; None on a CPU.

        Recorded steps are filled up to less than twice their sequences, and go on counting where the first did: there
        are enough for the widest from then on.
        """
        if not k.is_cuda:
            return None
        needed = 2 * self.slots * k.shape[1]
        if self._arrived is None or self._arrived.numel() < needed:
            self._arrived = torch.zeros(needed, dtype=torch.int32, device=k.device)
        return self._arrived

    def head_bytes(self, features: int, element: int) -> int:
        """Return the bytes of one head of keys (or values) in all slots; element: of a number in the compute dtype."""
        each = features + 4 * scales_of(features) if self._kind is Fp8 else features * element
        return self.slots * self.capacity * each

    @property
    def nbytes(self) -> int:
        """Bytes of what is allocated."""
        pairs = (*self._layers.values(), *self._sources.values())
        states = (one for state in self._states.values() for one in state)
        return sum(one.nbytes for pair in pairs for one in dict.fromkeys(pair)) + sum(one.nbytes for one in states)

    def keep_sources(
        self, index: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Keep a layer's keys and values k, v [G, H, D] of sources: each token's slot and place [G]."""
        if index not in self._sources:
            both = (self._kind(self.slots, self.source_capacity, x) for x in (k, v))
            self._sources[index] = tuple(both)  # type: ignore[assignment]
        for kept, new in zip(self._sources[index], (k, v), strict=True):
            kept.put(slots, places, new)

    def attend_sources(self, index: int, q: torch.Tensor, slots: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the attention [B, H, D] of one query each, q [B, H, D], to the sources in `slots` [B]."""
        lengths = self.source_lengths[slots]
        longest = int(lengths.max())
        seen = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]
        # A mask does not hide what is not finite, and nobody has written there yet.
        hidden = ~seen.squeeze(1).unsqueeze(-1)
        keys, values = (
            kept.of(slots, slice(0, longest)).masked_fill(hidden, 0) for kept in self._sources[index]
        )  # fmt: skip
        return scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=seen, scale=scale).squeeze(2)

    def states(self, index: int, y: torch.Tensor, mixer: Recurrent) -> States:
        """Return what the tokens of each slot have left in a layer of `mixer`, which reads y."""
        if index not in self._states:
            self._states[index] = mixer.nothing(self.slots, y)
        return self._states[index]

    def layer(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[Kept, Kept]:
        """Return (keys, values) of a layer, with the heads, dtype and device of k [F, K, D]; one memory where k is v.
        """
        if index not in self._layers:
            keys = self._kind(self.slots, self.capacity, k)
            self._layers[index] = (keys, keys if k is v else self._kind(self.slots, self.capacity, v))
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
        angles: Angles | None = None,
    ) -> torch.Tensor:
        """Keep k, v [F, K, D] of the new tokens of `layer`; return attention of q [F, H, D] over all tokens kept."""
        assert angles is None
        keys, values = self.cache.layer(layer, k, v)
        same, k = k is v, keys.put(self.slots, self.places, k)
        v = k if same else values.put(self.slots, self.places, v)
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
            k_seen, v_seen = (x.of(span.slot, seen).transpose(0, 1) for x in (keys, values))
            outputs.append(cached_attention(q[begin:end], k_seen, v_seen, window, scores))
        return torch.cat(outputs)

    def turns(self, x: torch.Tensor, group: int, head_dim: int) -> bool:
        """Return False: prompts are long."""
        return False

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

    def go_on(self, layer: int, y: torch.Tensor, mixer: Recurrent) -> torch.Tensor:
        """Return the results of `mixer` for y [F, ...], from what the slots hold, and keep what the tokens leave."""
        states, (slots, begins, documents) = self.cache.states(layer, y, mixer), self._sequences
        held = tuple(one[slots].masked_fill(begins.view(-1, *[1] * (one.dim() - 1)), 0.0) for one in states)
        out, left = mixer.continued(y, self.bounds, documents, held)
        for one, new in zip(states, left, strict=True):
            one[slots] = new
        return out

    @functools.cached_property
    def _sequences(self) -> tuple[torch.Tensor, torch.Tensor, Documents]:
        """The slot of each sequence, whether it begins, and its new tokens as a document: made once for all layers."""
        device = self.slots.device
        slots = to_device(torch.tensor([span.slot for span in self.spans]), device)
        begins = to_device(torch.tensor([span.start == 0 for span in self.spans]), device)
        return slots, begins, Documents.of(self.bounds, device)


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
        angles: Angles | None = None,
    ) -> torch.Tensor:
        """Do as PrefillStep.attend."""
        keys, values = self.cache.layer(layer, k, v)
        if chunk is not None and self.last < chunk:  # all are in their first chunk
            chunk = None
        how = self.positions, window, scores, chunk
        if isinstance(keys, Dense) and isinstance(values, Dense):
            arrived = self.cache.arrived(k)
            return decode_attention(q, k, v, keys.whole, values.whole, self.slots, *how, angles, arrived)
        assert angles is None
        keys.put(self.slots, self.positions, k)
        if values is not keys:
            values.put(self.slots, self.positions, v)
        longest = slice(0, self.last + 1)
        k_seen = keys.of(self.slots, longest)
        return kept_attention(q, k_seen, k_seen if values is keys else values.of(self.slots, longest), *how)

    def turns(self, x: torch.Tensor, group: int, head_dim: int) -> bool:
        """Return whether `attend` rotates q and k, as `models.inputs.Cache` says."""
        return self.cache.is_dense and turns(x, group, head_dim)

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

    def go_on(self, layer: int, y: torch.Tensor, mixer: Recurrent) -> torch.Tensor:
        """Do as PrefillStep.go_on."""
        return mixer.step(y, self.cache.states(layer, y, mixer), self.slots, self.cache.idle)
