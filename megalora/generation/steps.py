"""Steps of one stage over a key/value cache: whole prompts, or one token of each running sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megalora.generation.cache import DecodeStep, KVCache, NewSources, PrefillStep, Span
from megalora.generation.graphs import DecodeGraphs
from megalora.models.blocks.attention import AttentionBlock
from megalora.models.blocks.latent import LatentAttentionBlock
from megalora.models.inputs import Cache, Inputs, Placed, head_features
from megalora.models.rotary import rope_table
from megalora.models.spec import Alibi, Rotary
from megalora.models.stage import Stage
from megalora.ops.alibi import EXTRA
from megalora.ops.attention import pack
from megalora.ops.decode_attention import has_kernel
from megalora.ops.grouped import runs_grouped
from megalora.parallel.placement import Tokens
from megalora.pictures import Picture


class Steps:
    """The stage of this rank with a cache of `slots` sequences of up to `capacity` tokens, in 8 bits where fp8.

    Both kinds of step take token ids and, behind the first stage, `hidden` [tokens, hidden_size] of the stage before;
    both give the hidden states [tokens, hidden_size] that the next stage or the head reads.
    """

    def __init__(self, stage: Stage, slots: int, capacity: int, source_capacity: int = 0, fp8: bool = False):
        self.slots, self.capacity, self.source_capacity = slots, capacity, source_capacity
        self._stage, self._device = stage, torch.device(stage.place.device)
        recorded = graph_obstacle(stage, fp8) is None
        spare = slots if recorded else None
        self._cache = KVCache(slots + recorded, capacity, source_capacity, self._device, fp8, spare)
        self._rope = {rotary: self._tables(rotary) for rotary in stage.config.rotaries}
        # longrope: tokens of the first prompt of each slot. What follows in the slot keeps the frequencies of that.
        self._lengths = torch.zeros(self._cache.slots, dtype=torch.int64, device=self._device)
        self._prompted = [0] * self._cache.slots  # the same on the host
        self._graphs: DecodeGraphs | None = None
        if recorded:
            like = torch.empty(stage.config.hidden_size, dtype=stage.place.dtype, device=self._device)
            first = stage.embedding is not None
            self._graphs = DecodeGraphs(self._decode, slots, self._device, None if first else like)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the tokens of the one before are known: it is a graph, so of one GPU.
        """
        return self._graphs is not None and self._stage.embedding is not None and self._stage.head is not None

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values once a prompt was fed, but for those of sources."""
        element, stage = self._stage.place.dtype.itemsize, self._stage
        entries = [entry for block in stage.attentions for entry in _entries(block)]
        keys = sum(heads * self._cache.head_bytes(features, element) for heads, features in entries)
        like = torch.empty(0, dtype=stage.place.dtype, device="meta")
        states = [block.nothing(self._cache.slots, like) for block in stage.recurrent]
        return keys + sum(one.nbytes for state in states for one in state)

    @property
    def recurrent(self) -> bool:
        """Whether a slot holds a state, which all its tokens have left: it goes on behind the last of them alone."""
        return self._stage.config.recurrent

    def prefill(
        self,
        hidden: torch.Tensor | None,
        token_ids: Sequence[int],
        spans: Sequence[Span],
        adapters: Sequence[int] | None = None,
        sources: Sequence[Sequence[int]] = (),
        lengths: Sequence[int] | None = None,
        pictures: Sequence[Picture | None] = (),
    ) -> torch.Tensor:
        """Feed token_ids, the tokens of the spans one after another.

        adapters  the adapter of each sequence where the stage shares several (Stage.share_adapters), else not read
        lengths   of each sequence's whole prompt, of which a span may be a part; None: the spans end them
        sources   of an encoder-decoder: that of each sequence, whose tokens stand before the others in `hidden`
        pictures  the image of each sequence, at the start of its source, or of its prompt where it has none
        """
        place = self._stage.place
        if any(rotary.long is not None for rotary in self._rope):
            for span, length in zip(spans, lengths or [span.stop for span in spans], strict=True):
                if span.start == 0:
                    self._lengths[span.slot] = self._prompted[span.slot] = length
        step = PrefillStep.of(self._cache, spans, head_features(self._stage.config), place.dtype, self._device)
        of_tokens = None
        if self._stage.shares_adapters:
            tokens = torch.tensor([span.stop - span.start for span in spans])
            of_tokens = torch.tensor(adapters).repeat_interleave(tokens).to(self._device)
        ids, source = torch.tensor(token_ids, device=self._device), None
        if sources:
            new = NewSources.of([span.slot for span in spans], [len(one) for one in sources], self._device)
            of_slots = torch.tensor([len(one) for one in sources], device=self._device)
            self._cache.source_lengths[torch.tensor([span.slot for span in spans], device=self._device)] = of_slots
            step = replace(step, sources=new)
            source = self._source(sources, new, self._placed(pictures, [(0, len(one)) for one in sources]))
            pictures = ()
        placed = self._placed(pictures, [(span.start, span.stop) for span in spans])
        return self._run(hidden, ids, step.slots, step.places, of_tokens, step, source, placed)

    def _placed(self, pictures: Sequence[Picture | None], parts: Sequence[tuple[int, int]]) -> Placed | None:
        """Return where images go whose texts are fed from `start` to `stop` each; None where no token is of one."""
        found = [picture for picture in pictures if picture is not None]
        if not found or self._stage.embedding is None:
            return None
        columns, number = [], 0
        for picture, (start, stop) in zip(pictures, parts, strict=True):
            column = torch.zeros(stop - start, 2, dtype=torch.int64)
            if picture is not None:
                number += 1
                own = torch.arange(start, max(start, min(stop, picture.tokens)))
                column[: len(own), 0], column[: len(own), 1] = number, own
            columns.append(column)
        return Placed.of(found, torch.cat(columns), self._stage.place)

    def _source(self, sources: Sequence[Sequence[int]], new: NewSources, placed: Placed | None) -> Inputs:
        """Return what the encoder reads."""
        ids = torch.tensor([token for one in sources for token in one], device=self._device)
        tokens = Tokens(new.places, new.places, seed=None, step=0)
        dtype = self._stage.place.dtype
        packed = pack(new.bounds, self._stage.config.head_dim, dtype, self._device)
        return Inputs(ids, None, None, new.bounds, {}, tokens, packed=packed, position_ids=new.places, placed=placed)

    def goes_on(self, slot: int, length: int) -> bool:
        """Return whether a prompt of `length` tokens may keep what the slot holds: keys of the same frequencies."""
        limits = [rotary.long_from for rotary in self._rope if rotary.long is not None]
        return all((self._prompted[slot] > limit) == (length > limit) for limit in limits)

    def adapters_switched(self) -> None:
        """Call after `Stage.switch_adapters`: a trained embedding reads other tensors now than graphs recorded."""
        if self._graphs is not None and self._stage.trains_words:
            self._graphs.forget()

    def decode(
        self,
        hidden: torch.Tensor | None,
        token_ids: Sequence[int] | torch.Tensor,
        slots: Sequence[int],
        places: Sequence[int],
        adapters: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Feed one token of each sequence: token_ids[i] takes places[i] of slots[i]; no slot twice.

        token_ids [n] may lie on the device: nothing waits for them then
        adapters  as `prefill` takes them
        What it gives may be overwritten by the next step.
        """
        where = slots, places, adapters or [0] * len(slots)
        if self._graphs is not None:
            return self._graphs(hidden, token_ids, *where)
        ids = torch.as_tensor(token_ids, device=self._device)
        return self._decode(hidden, ids, *torch.tensor(where, device=self._device))

    def _decode(
        self,
        hidden: torch.Tensor | None,
        ids: torch.Tensor,
        slots: torch.Tensor,
        places: torch.Tensor,
        adapters: torch.Tensor,
    ) -> torch.Tensor:
        of_tokens = adapters if self._stage.shares_adapters else None
        return self._run(hidden, ids, slots, places, of_tokens, DecodeStep(self._cache, slots, places))

    def _tables(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of every place [capacity, n / 2]; with longrope behind them those of long sequences."""
        positions = torch.arange(self.capacity, device=self._device)
        kinds = [replace(rotary, long=None)]
        if rotary.long is not None:
            kinds.append(replace(rotary, inverse_frequencies=rotary.long, long=None))
        tables = [rope_table(kind, positions, self._stage.place.dtype, (0, self.capacity)) for kind in kinds]
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return cos, sin

    def _rows(self, rotary: Rotary, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the rows of `_tables` for tokens at these places of these slots."""
        return places if rotary.long is None else places + self.capacity * (self._lengths[slots] > rotary.long_from)

    def _run(
        self,
        hidden: torch.Tensor | None,
        ids: torch.Tensor,
        slots: torch.Tensor,
        places: torch.Tensor,
        adapters: torch.Tensor | None,
        cache: Cache,
        source: Inputs | None = None,
        placed: Placed | None = None,
    ) -> torch.Tensor:
        tables = {}
        for rotary, (cos, sin) in self._rope.items():
            rows = self._rows(rotary, slots, places)
            tables[rotary] = cos[rows], sin[rows]
        # No dropout, so nothing is drawn from the places.
        tokens = Tokens(places, places, seed=None, step=0, adapters=adapters)
        inputs = Inputs(ids, None, None, (), tables, tokens, cache, position_ids=places, source=source, placed=placed)
        return self._stage(hidden, inputs)


def _entries(block: AttentionBlock | LatentAttentionBlock) -> list[tuple[int, int]]:
    """Return (heads, features) of what a layer keeps of a token: keys and values, or one latent."""
    if isinstance(block, LatentAttentionBlock):
        return [(1, block.spec.latent + block.spec.turned)]
    position = block.spec.position
    width = block.spec.head_dim + EXTRA * (isinstance(position, Alibi) and position.rounded)
    return 2 * [(block.kv_heads if block.reads is None else block.heads, width)]


def graph_obstacle(stage: Stage, fp8: bool) -> str | None:
    """Return what keeps decoding steps from being CUDA graphs: shapes that change, or a wait for the host; else None.

    fp8: of the cache
    """
    place, config = stage.place, stage.config
    device, dtype = torch.device(place.device), str(place.dtype).removeprefix("torch.")
    if device.type != "cuda":
        return "there is no GPU"
    if fp8:
        return "keys and values in 8 bits are decoded by torch"
    if place.tp.size > 1:
        return "the GPUs of a stage send messages within a step"
    if not all(block.steps_alike for block in stage.recurrent):
        return "linear attention of this model has no decoding kernel"
    found = stage.attentions  # none where all of a stage's layers keep states
    attentions = [block for block in found if isinstance(block, AttentionBlock)]
    if config.encoder is not None or not config.plain_scores or len(attentions) < len(found):
        return "attention of this model has no decoding kernel"
    for attention in attentions:
        group = attention.heads // attention.kv_heads
        if not has_kernel("cuda", place.dtype, group, attention.spec.head_dim):
            heads = f"heads of {attention.spec.head_dim}, {group} for each key head,"
            return f"attention in {dtype} with {heads} has no decoding kernel"
    if config.has_experts and not runs_grouped(device, place.dtype):
        return f"experts in {dtype} count their tokens on the host"
    return None
