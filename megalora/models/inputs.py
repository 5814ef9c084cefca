"""What the layers of a stage read besides the hidden states: the same for every layer of one microbatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch

from megalora.batch import Batch, to_device
from megalora.models.rotary import rope_table
from megalora.models.spec import Alibi, Attention, LatentAttention, ModelSpec, Rotary
from megalora.ops.alibi import EXTRA
from megalora.ops.attention import Packed, Scores, in_chunks, pack
from megalora.ops.cross_attention import Crossing
from megalora.ops.delta_rule import Documents
from megalora.parallel.context import ContextKeys
from megalora.parallel.placement import Placement, Tokens
from megalora.pictures import Picture

Angles = tuple[torch.Tensor, torch.Tensor]  # cos and sin
RopeTables = Mapping[Rotary, Angles]


States = tuple[torch.Tensor, ...]
"""What earlier tokens of several sequences leave in a layer: tensors [sequences, ...]."""


@runtime_checkable
class Recurrent(Protocol):
    """A mixer that reads of earlier tokens what they leave (megalora.models.blocks.delta and its like)."""

    def nothing(self, count: int, like: torch.Tensor) -> States:
        """Return what `count` sequences without tokens leave; like: their first tokens."""
        ...

    def continued(
        self, y: torch.Tensor, bounds: Sequence[int], documents: Documents, kept: States
    ) -> tuple[torch.Tensor, States]:
        """Return the results of the next tokens of sequences with these bounds in F, and what they leave.

        documents  of these bounds
        """
        ...

    def step(self, y: torch.Tensor, kept: States, slots: torch.Tensor, idle: int | None) -> torch.Tensor:
        """Return the results of one token of each sequence and bring what their slots [B] int64 keep forward, in place.

        kept  of all slots; idle: one of no sequence, which rows of none name, or None
        """
        ...

    @property
    def steps_alike(self) -> bool:
        """Whether `step` has the same shapes and addresses whatever the tokens are, so that a CUDA graph can hold it.
        """
        ...


class Cache(Protocol):
    """Keys and values of earlier tokens (generation)."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        window: int | None,
        scores: Scores,
        chunk: int | None = None,
        angles: Angles | None = None,
    ) -> torch.Tensor:
        """Keep k, v [F, K, D] of the new tokens of `layer`; return attention of q [F, H, D] over all tokens kept.

        window, chunk  as models.spec.Attention has them
        angles  cos and sin [F, D / 2] by which q and k are rotated first, where `turns`; None: they are as they come
        """
        ...

    def turns(self, x: torch.Tensor, group: int, head_dim: int) -> bool:
        """Return whether `attend` rotates q and k of heads like x, `group` query heads a key head."""
        ...

    def cross(
        self, layer: int, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Keep k, v [G, H, D] of new sources; return the attention of q [F, H, D] to the source of each sequence."""
        ...

    def go_on(self, layer: int, y: torch.Tensor, mixer: Recurrent) -> torch.Tensor:
        """Return the results of `mixer` for the new tokens y [F, ...] of `layer`; keep what they leave."""
        ...


@dataclass(frozen=True)
class Placed:
    """Images before texts, and where their vectors go.

    pictures  those that this rank's tokens are of
    tokens    [n] int64, places among this rank's tokens
    rows      [n] int64, what goes there: a row of the vectors of `pictures`, one image after another
    """

    pictures: tuple[Picture, ...]
    tokens: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, pictures: Sequence[Picture], column: torch.Tensor, place: Placement) -> Placed | None:
        """Return it from a batch's images and its column "pictures" [F, 2] on the CPU; None where there are none."""
        own = place.own_tokens(column)
        tokens = own[:, 0].nonzero().squeeze(-1)
        if not len(tokens):
            return None
        numbers, rows = own[tokens].unbind(1)
        seen, of_seen = numbers.unique(return_inverse=True)
        chosen = tuple(pictures[number - 1] for number in seen.tolist())
        starts = torch.tensor([0, *(one.tokens for one in chosen)]).cumsum(0)
        return cls(chosen, to_device(tokens, place.device), to_device(starts[of_seen] + rows, place.device))


@dataclass(frozen=True)
class Inputs:
    """One microbatch as the layers see it.

    input_ids  [F] int64
    labels     [F] int64, shifted, or None where no loss is asked for
    labelled   [L] int64, the places where labels is not -100, or None as labels
    weights    [L] float32, what each of those labels counts for in the loss; None: 1 each
    bounds     cumulative document bounds in F, as ints
    tables     of each rotation cos and sin [F, n / 2] in the compute dtype
    tokens     places of the tokens and what dropout is drawn from
    cache      earlier keys and values, or None (training)
    packed     the bounds for kernels that read them on the device, where some do
    position_ids  [F] int64, each token's place in its document; None where no layer of the model reads it
    chosen     of a part that is computed again in backward: what its routers chose, by name, so that the second pass
               takes every token where the first one did; None where nothing is computed again
    columns    what else the embedding reads of each token, [F] or [F, k] int64, by name
    measures   the sums of the task's metrics are asked for, not the loss alone
    context    where attention finds the keys of other ranks (context parallelism), or None
    attention_kept  what attention goes through where its result is kept while the rest is computed again, or None
    source     of an encoder-decoder, whose own fields are those of the decoder's tokens: what the encoder's layers read
               of theirs; None where no source is new (a decoding step)
    memory     [S, hidden_size] what the encoder leaves of this rank's tokens: its gradient is the encoder's
    crossing   which of its tokens each decoder's token sees
    unread     nobody reads the result of the mixer at work (see megalora.models.recompute): its last product is
               left out
    placed     images before texts, where there are such
    chunks     bounds and packed of the documents cut into chunks, by their size
    documents  the same for layers with states (ModelSpec.recurrent), where there are such and no cache
    """

    input_ids: torch.Tensor
    labels: torch.Tensor | None
    labelled: torch.Tensor | None
    bounds: tuple[int, ...]
    tables: RopeTables
    tokens: Tokens
    cache: Cache | None = None
    packed: Packed | None = None
    position_ids: torch.Tensor | None = None
    chosen: dict[str, torch.Tensor] | None = None
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    measures: bool = False
    context: ContextKeys | None = None
    attention_kept: Callable[..., torch.Tensor] | None = None
    source: Inputs | None = None
    memory: torch.Tensor | None = None
    crossing: Crossing | None = None
    unread: bool = False
    weights: torch.Tensor | None = None
    chunks: Mapping[int, tuple[tuple[int, ...], Packed | None]] = field(default_factory=dict)
    placed: Placed | None = None
    documents: Documents | None = None

    def attend(self, attention: Callable[..., torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
        """Return attention(*sources), for all tensors that need a gradient: all attention in training goes this way."""
        return attention(*sources) if self.attention_kept is None else self.attention_kept(attention, *sources)


def rope_tables(spec: ModelSpec, position_ids: torch.Tensor, dtype: torch.dtype, bounds: tuple[int, ...]) -> RopeTables:
    """Return the tables of every rotation in the model at positions [F] of documents with these cumulative bounds."""
    return {rotary: rope_table(rotary, position_ids, dtype, bounds) for rotary in spec.rotaries}


def head_features(config: ModelSpec) -> int:
    """Return the most features of a head that kernels of attention see: ALiBi adds some, values may have more."""
    sizes = [config.head_dim]
    for mixer in config.mixers:
        if isinstance(mixer, Attention):
            sizes.append(mixer.head_dim + EXTRA * isinstance(mixer.position, Alibi))
        elif isinstance(mixer, LatentAttention):
            sizes.append(max(mixer.head_dim, mixer.value))
    return max(sizes)


def training_inputs(batch: Batch, config: ModelSpec, place: Placement, *, seed: int | None, step: int) -> Inputs:
    """Return the Inputs of a microbatch; seed None switches dropout off (evaluation)."""
    # Before the copy to the device: reading these there would wait for it.
    bounds = tuple(batch.cu_seqlens.tolist())
    kinds = head_features(config), place.dtype, torch.device(place.device)
    packed = pack(bounds, *kinds)
    cuts = {chunk: in_chunks(bounds, chunk) for chunk in config.chunks}
    chunks = {chunk: (cut, packed if cut == bounds else pack(cut, *kinds)) for chunk, cut in cuts.items()}
    placed = Placed.of(batch.pictures, batch.columns["pictures"], place) if batch.pictures else None
    labelled = (batch.labels != -100).nonzero().squeeze(-1)
    weights = None if batch.weights is None else to_device(batch.weights[labelled], place.device)
    labelled = to_device(labelled, place.device)
    batch = batch.to(place.device)
    tables = rope_tables(config, batch.position_ids, place.dtype, bounds)
    index = batch.token_index
    tokens = Tokens(index, place.own_tokens(index), seed, step)
    context = None
    if batch.context is not None:
        context = ContextKeys(place.cp, batch.context, torch.device(place.device))
    positions = batch.position_ids if config.reads_positions else None
    found = Inputs(
        batch.input_ids,
        batch.labels,
        labelled,
        bounds,
        tables,
        tokens,
        packed=packed,
        position_ids=positions,
        context=context,
        columns=batch.columns,
        weights=weights,
        chunks=chunks,
        placed=placed,
        documents=Documents.of(bounds, place.device) if config.recurrent else None,
    )
    if batch.source is None:
        return found
    kinds = config.head_dim, place.dtype, torch.device(place.device)
    return replace(
        found,
        source=training_inputs(batch.source, config, place, seed=seed, step=step),
        crossing=Crossing.of(batch.crossing[0], batch.crossing[1], *kinds),
    )
