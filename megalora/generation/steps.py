"""Steps of one stage over a key/value cache: whole prompts, or one token of each running sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalora.generation.cache import DecodeStep, KVCache, PrefillStep, Span
from megalora.models.inputs import Cache, Inputs, rope_tables
from megalora.models.stage import Stage
from megalora.parallel.linear import Tokens


class Steps:
    """The stage of this rank with a cache of `slots` sequences of up to `capacity` tokens.

    Both kinds of step take token ids and, behind the first stage, `hidden` [tokens, hidden_size] of the stage before;
    both give the hidden states [tokens, hidden_size] that the next stage or the head reads.
    """

    def __init__(self, stage: Stage, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self._stage, self._device = stage, stage.place.device
        self._cache = KVCache(slots, capacity)
        positions = torch.arange(capacity, device=self._device)
        self._rope = rope_tables(stage.config, positions, stage.place.dtype)

    def prefill(self, hidden: torch.Tensor | None, token_ids: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        """Feeds token_ids, the tokens of the spans one after another."""
        places = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(self._device)
        ids = torch.tensor(token_ids, device=self._device)
        return self._run(hidden, ids, places, PrefillStep(self._cache, spans))

    def decode(
        self, hidden: torch.Tensor | None, token_ids: Sequence[int], slots: Sequence[int], places: Sequence[int]
    ) -> torch.Tensor:
        """Feeds one token of each sequence: token_ids[i] takes places[i] of slots[i]; no slot twice."""
        ids, at, to = torch.tensor([token_ids, slots, places], device=self._device)
        return self._run(hidden, ids, to, DecodeStep(self._cache, at, to))

    def _run(self, hidden: torch.Tensor | None, ids: torch.Tensor, places: torch.Tensor, cache: Cache) -> torch.Tensor:
        cos, sin = (table[places] for table in self._rope)
        tokens = Tokens(places, places, seed=None, step=0)  # no dropout, so nothing is drawn from them
        return self._stage(hidden, Inputs(ids, None, None, (), cos, sin, tokens, cache))
