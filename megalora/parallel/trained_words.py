"""An embedding and a head of which something is trained (see megalora.adapters.words), cut over tp on the vocabulary.

Unlike the layers these go through autograd as they are written: what is trained is a master in float32, cast where it
is used. Rows of tokens are whole on every rank, which adds to the gradients of those that it owns.

Legend: F tokens of the microbatch, T those of this rank, V words of this rank, H width, r rank, N labelled tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from megalora.adapters.lora import initial_factor
from megalora.adapters.words import WordsAdapter
from megalora.ops.cross_entropy import PLAIN, LogitForm
from megalora.ops.dropout import keep_mask, named_site
from megalora.parallel.collectives import all_gather, all_reduce, local_tokens
from megalora.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from megalora.parallel.linear import LoraFactor
from megalora.parallel.placement import Placement, Tokens
from megalora.parallel.split import Split, even_part, whole_split


class TokenRows(nn.Module):
    """`trainable_tokens_delta` [n, H]: the rows of tokens `ids`, which stand for those of the matrix."""

    def __init__(self, ids: tuple[int, ...], vocab_size: int, width: int, place: Placement):
        super().__init__()
        self.ids = torch.tensor(ids, device=place.device)
        self.trainable_tokens_delta = nn.Parameter(
            torch.empty(len(ids), width, dtype=place.master_dtype, device=place.device)
        )
        self._split = whole_split((len(ids), width), place.tp, partial_grad=True)
        self.place_of = torch.full((vocab_size,), -1, device=place.device)  # of each token's row, -1 where it has none
        self.place_of[self.ids] = torch.arange(len(ids), device=place.device)

    def shard_dims(self) -> dict[str, Split]:
        return {"trainable_tokens_delta": self._split}

    @torch.no_grad()
    def reset(self, words: VocabParallelEmbedding | VocabParallelHead) -> None:
        """Set the rows to those of the matrix. Collective over tp."""
        mine = (self.ids >= words.start) & (self.ids < words.stop)
        rows = words.weight[(self.ids - words.start) * mine].to(self.trainable_tokens_delta.dtype)
        self.trainable_tokens_delta.copy_(all_reduce(rows * mine.unsqueeze(1), words.place.tp))


class TrainedEmbedding(VocabParallelEmbedding):
    """name: of the module, from which initial factors are drawn."""

    def __init__(self, name: str, vocab_size: int, width: int, place: Placement, adapter: WordsAdapter):
        super().__init__(vocab_size, width, place)
        self.name, self.adapter = name, adapter
        if adapter.whole:
            _train_weight(self, place)
        self.token_adapter = TokenRows(adapter.tokens, vocab_size, width, place) if adapter.tokens else None
        self.active = True  # the adapter is in force (generation may switch it off)
        self._base: torch.Tensor | None = None
        if adapter.lora is not None:
            r = adapter.lora.r
            part = even_part(vocab_size, place.tp).cut()
            self._factors = {
                "lora_embedding_A": part.split((r, vocab_size), 1),
                "lora_embedding_B": whole_split((width, r), place.tp, partial_grad=True),
            }
            for factor, split in self._factors.items():
                self.register_parameter(factor, nn.Parameter(
                    torch.empty(split.local_shape, dtype=place.master_dtype, device=place.device)
                ))

    def shard_dims(self) -> dict[str, Split]:
        return super().shard_dims() | (self._factors if self.adapter.lora is not None else {})

    @torch.no_grad()
    def reset(self, seed: int, init: bool | str) -> None:
        """Set initial factors, as peft's: A zero, B normal; both normal where init is False. Rows: see TokenRows.reset.
        """
        if self.adapter.lora is None:
            return
        for factor, split in self._factors.items():
            whole = torch.zeros(split.global_shape)
            if factor.endswith("B") or init is False:
                digest = hashlib.sha256(f"{seed}:{self.name}.{factor}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                whole.normal_(generator=generator)
            getattr(self, factor).copy_(split.slice(whole))

    def keep_base(self) -> None:
        """Keep the base's matrix, to `switch` later, where an adapter brings another. Call before it is loaded."""
        self._base = self.weight.detach().to(self.place.dtype, copy=True) if self.adapter.whole else None

    def switch(self, adapted: bool) -> None:
        """Put the adapter in force, or the base alone (generation)."""
        self.active = adapted

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map input_ids [F] to [T, H]: this rank's tokens under sequence parallelism, else all."""
        dtype, mine = self.place.dtype, None
        local = input_ids
        if self.place.tp.size > 1:
            mine = (input_ids >= self.start) & (input_ids < self.stop)
            local = (input_ids - self.start) * mine
        rows = nn.functional.embedding(local, _matrix(self)).to(dtype)
        if self.token_adapter is not None and self.active:
            place = self.token_adapter.place_of[input_ids]
            own = nn.functional.embedding(place.clamp_min(0), self.token_adapter.trainable_tokens_delta)
            rows = torch.where((place >= 0).unsqueeze(1), own.to(dtype), rows)
        if self.adapter.lora is not None and self.active:
            A, B = self.get_parameter("lora_embedding_A"), self.get_parameter("lora_embedding_B")
            a = nn.functional.embedding(local, A.t()).to(dtype)
            rows = rows + self.adapter.lora.scaling * (a @ B.to(dtype).t())
        if mine is None:
            return rows
        return _SumWords.apply(rows * mine.unsqueeze(1), self.place)


class TrainedHead(VocabParallelHead):
    """name: of the module, from which initial factors and the dropout's site are taken.

    tied_rows  those of the embedding, which a tied head shares
    """

    def __init__(
        self, name: str, vocab_size: int, width: int, place: Placement, adapter: WordsAdapter, **options: object
    ):
        super().__init__(vocab_size, width, place, **options)  # type: ignore[arg-type]
        self.name, self.adapter = name, adapter
        if adapter.whole:
            _train_weight(self, place)
        self.token_adapter = TokenRows(adapter.tokens, vocab_size, width, place) if adapter.tokens else None
        self.tied_rows: Callable[[], TokenRows | None] = lambda: None
        self.lora_A: LoraFactor | None = None
        self.lora_B: LoraFactor | None = None
        self.active = True
        self._base: torch.Tensor | None = None
        if adapter.lora is not None:
            cut = even_part(vocab_size, place.tp).cut()
            self._factors = {
                "lora_A.weight": whole_split((adapter.lora.r, width), place.tp, partial_grad=True),
                "lora_B.weight": cut.split((vocab_size, adapter.lora.r), 0),
            }
            self.lora_A, self.lora_B = (LoraFactor(split.local_shape, place) for split in self._factors.values())
        self._site = named_site(name)

    def shard_dims(self) -> dict[str, Split]:
        return super().shard_dims() | (self._factors if self.adapter.lora is not None else {})

    @property
    def rows(self) -> TokenRows | None:
        """The rows of tokens that stand for those of the weight: its own, or those of a tied embedding."""
        return self.token_adapter if self.token_adapter is not None else self.tied_rows()

    @torch.no_grad()
    def reset(self, seed: int, init: bool | str) -> None:
        """Set initial factors, as of any linear."""
        if self.adapter.lora is None:
            return
        for (key, split), factor in zip(self._factors.items(), (self.lora_A, self.lora_B), strict=True):
            whole = initial_factor(f"{self.name}.{key}", split.global_shape, seed, init, self.adapter.lora.r)
            factor.weight.copy_(split.slice(whole))

    def keep_base(self) -> None:
        """Do as TrainedEmbedding."""
        self._base = self.weight.detach().to(self.place.dtype, copy=True) if self.adapter.whole else None

    def switch(self, adapted: bool) -> None:
        """Do as TrainedEmbedding."""
        self.active = adapted

    def trained(self) -> list[nn.Parameter]:
        """Return what gets a gradient from the logits."""
        found = [self.weight] if self.adapter.whole else []
        found += [] if self.rows is None else [self.rows.trainable_tokens_delta]
        return found + [factor.weight for factor in (self.lora_A, self.lora_B) if factor is not None]

    def logits(self, hidden: torch.Tensor, index: torch.Tensor | None = None, tokens: Tokens | None = None):
        """Map hidden [N, H], whole on each rank, to logits [N, V] of this rank's rows, for autograd.

        index   [N] int64, the places of the rows among the microbatch's tokens, for dropout; None: no dropout
        """
        dtype = self.place.dtype
        logits = hidden @ _matrix(self).to(dtype).t()
        if self.rows is not None and self.active:
            mine = (self.rows.ids >= self.start) & (self.rows.ids < self.stop)
            own = hidden @ self.rows.trainable_tokens_delta.to(dtype).t()
            at = (self.rows.ids - self.start)[mine]
            logits = logits.index_copy(1, at, own[:, mine])
        if self.adapter.lora is not None and self.active:
            p = self.adapter.lora.dropout
            draw = None if tokens is None else tokens.draw(p, self._site)
            if draw is not None:
                hidden = hidden * (keep_mask(tokens.index[index], hidden.shape[1], draw) * draw.scale).to(dtype)
            z = hidden @ self.lora_A.weight.to(dtype).t()
            logits = logits + self.adapter.lora.scaling * (z @ self.lora_B.weight.to(dtype).t())
        if self.added is not None:
            logits = logits + self.added
        scale, softcap = self.form
        logits = logits * scale
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def unformed(self, hidden: torch.Tensor) -> tuple[torch.Tensor, LogitForm]:
        return self.logits(hidden), PLAIN


def _train_weight(words: VocabParallelEmbedding | VocabParallelHead, place: Placement) -> None:
    """Make the matrix itself a trained master."""
    shape = words.weight.shape
    words.weight = nn.Parameter(torch.empty(shape, dtype=place.master_dtype, device=place.device))


def _matrix(words: TrainedEmbedding | TrainedHead) -> torch.Tensor:
    """Return the matrix that is in force: the trained one, or the base's where it is kept and the adapter is off."""
    return words.weight if words.active or words._base is None else words._base


class _SumWords(torch.autograd.Function):
    """Forward sums over tp and keeps this rank's tokens; backward gathers the gradients of all."""

    @staticmethod
    def forward(ctx, rows, place):
        ctx.place = place
        hidden = all_reduce(rows.clone(), place.tp)
        return local_tokens(hidden, place.tp).clone() if place.cuts_tokens else hidden

    @staticmethod
    def backward(ctx, dy):
        return all_gather(dy.contiguous(), ctx.place.tp) if ctx.place.gathers else dy, None
