"""The stages of one copy of the model (its pp x tp ranks) as a thing that replies.

Every rank of a replica holds the same sequences and runs the same steps. Prompts that find a free slot of the cache
are fed whole, in one step together; then all running sequences go on by one token a step. The last stage says which
token comes next to all; whoever listens on the first rank may end a reply before the model does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from megalora.errors import UserError
from megalora.generation.cache import Span
from megalora.generation.sampling import NOT_FINITE, Sampling, Seen, choose, draw
from megalora.generation.steps import Steps
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis

MAX_RUNNING = 64  # sequences that run at a time,
CACHE_TOKENS = 32768  # as far as the cache, of this many tokens, holds them
FEW = 8  # where no more run, each may have a share of the cache as if they were so many: a dialogue seldom outgrows it
STEP_TOKENS = 8192  # prompts join a step up to this many tokens: it bounds the memory of the activations
REFILL = 8  # new prompts join when one slot in this many is free: few steps, each of many tokens
WORTH_KEEPING = 32  # a prompt that begins with at least this many tokens of what a free slot holds goes on from there

STOP, LENGTH, INTERRUPTED = "stop", "length", "interrupted"
_VERDICTS = (None, STOP, INTERRUPTED)  # of a listener, as they are told to the other ranks


@dataclass(frozen=True)
class Prompt:
    """number: of the prompt in the run, which its random numbers come from; token_ids: at least one."""

    number: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class Reply:
    """token_ids without the one that stopped it; finish_reason: why it ends, STOP, LENGTH or INTERRUPTED."""

    token_ids: tuple[int, ...]
    finish_reason: str


class Listener(Protocol):
    """Hears the replies while they are made."""

    def hear(self, prompt: Prompt, token_id: int) -> str | None:
        """The next token of the reply to a prompt. Returns STOP or INTERRUPTED to end the reply with it."""
        ...

    def done(self, prompt: Prompt, reply: Reply) -> None:
        """The reply is whole."""
        ...


@dataclass
class _Sequence:
    """A prompt under way. kept: its tokens in the cache; room: longest reply."""

    prompt: Prompt
    slot: int
    room: int
    kept: int
    reply: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Replica:
    """stage, pp, tp    this rank's part of the model, and the ranks of the others
    context          longest prompt and reply together, in tokens
    stop_token_ids   each of them ends a reply
    listened_to      whether the first rank (of pp and tp) brings a Listener
    keep_logits      is given each prompt and its logits [tokens, vocab_size], on the last stage's first rank; all ranks
                     bring one or none does
    """

    def __init__(
        self,
        stage: Stage,
        pp: Axis,
        tp: Axis,
        context: int,
        sampling: Sampling,
        stop_token_ids: Collection[int],
        *,
        listened_to: bool = False,
        keep_logits: Callable[[Prompt, torch.Tensor], None] | None = None,
    ):
        stage.refresh_adapters()
        self._stage, self._pp, self._tp = stage, pp, tp
        self._context, self._sampling, self._stop = context, sampling, frozenset(stop_token_ids)
        self._listened_to, self._keep_logits = listened_to, keep_logits
        self._steps: Steps | None = None
        self._held: list[list[int]] = []  # tokens that each slot of the cache holds
        self._seen: Seen | None = None
        self._adapted = True

    def switch_adapter(self, on: bool) -> None:
        """Replies from now on are those of the adapted model, as at first, or of the base."""
        if on != self._adapted:
            self._adapted = on
            self._stage.switch_adapters(on)
            self._held = [[] for _ in self._held]  # keys and values are another model's now

    @torch.inference_mode()
    def replies(self, prompts: Sequence[Prompt], max_new_tokens: int, listener: Listener | None = None) -> list[Reply]:
        """The reply to each prompt, in order. Collective over the replica, with the same prompts on every rank.

        Prompts run together as far as there is room; one that ends makes place for the next.
        Raises UserError, on every rank, where a token has no embedding or the logits are not finite.
        """
        if not prompts:
            return []
        self._make_room(prompts, max_new_tokens)
        waiting, free, running = deque(prompts), list(range(self._steps.slots)), []
        done: dict[int, Reply] = {}
        while waiting or running:
            if waiting and (not running or len(free) >= max(1, self._steps.slots // REFILL)):
                fed = self._seat(waiting, free, max_new_tokens)
                tokens = self._prefill(fed)
                running += fed
            else:
                fed = running
                tokens = self._decode(fed)
            for sequence, token in zip(fed, tokens, strict=True):
                self._take(sequence, token)
            self._listen(fed, listener)
            for sequence in fed:
                if sequence.finish_reason is not None:
                    reply = Reply(tuple(sequence.reply), sequence.finish_reason)
                    done[sequence.prompt.number] = reply
                    free.append(sequence.slot)
                    if listener is not None:
                        listener.done(sequence.prompt, reply)
            running = [sequence for sequence in running if sequence.finish_reason is None]
        return [done[prompt.number] for prompt in prompts]

    # ---- who runs ----

    def _make_room(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """A cache that holds as many of the prompts and their replies as may run together; the last one if it does."""
        largest, words = max(max(p.token_ids) for p in prompts), self._stage.config.vocab_size
        if largest >= words:
            raise UserError(
                f"the tokenizer gives token id {largest}, but the model's vocab_size ({words}) ends before: take "
                f"tokenizer and model from one folder"
            )
        capacity = min(self._context, max(len(p.token_ids) for p in prompts) + max_new_tokens)
        slots = min(len(prompts), MAX_RUNNING, max(1, CACHE_TOKENS // capacity))
        if self._steps is not None and self._steps.slots >= slots and self._steps.capacity >= capacity:
            return
        if slots <= FEW:
            capacity = min(self._context, max(2 * capacity, CACHE_TOKENS // FEW))
        self._steps = None  # before the next one is made: there may not be room for both
        self._steps = Steps(self._stage, slots, capacity)
        self._held = [[] for _ in range(slots)]
        if self._sampling.repetition_penalty != 1.0 and self._chooses:
            self._seen = Seen(slots, words, self._stage.place.device)

    def _seat(self, waiting: deque[Prompt], free: list[int], max_new_tokens: int) -> list[_Sequence]:
        """Takes waiting prompts into free slots, as many as one step feeds."""
        seated: list[_Sequence] = []
        fed = 0
        while waiting and free and (fed == 0 or fed + len(waiting[0].token_ids) <= STEP_TOKENS):
            prompt = waiting.popleft()
            room = min(max_new_tokens, self._context - len(prompt.token_ids))
            assert room > 0, "a prompt must be shorter than the context"
            slot, kept = self._slot_for(prompt, free)
            free.remove(slot)
            self._held[slot] = list(prompt.token_ids)
            if self._seen is not None:
                self._seen.start(slot, prompt.token_ids)
            seated.append(_Sequence(prompt, slot, room, kept))
            fed += len(prompt.token_ids) - kept
        return seated

    def _slot_for(self, prompt: Prompt, free: Sequence[int]) -> tuple[int, int]:
        """(slot, tokens of the prompt that it holds already), in a dialogue the turns before."""
        if self._keep_logits is not None:  # of all tokens: all are fed
            return free[-1], 0
        common = {slot: _common(self._held[slot], prompt.token_ids) for slot in free}
        best = max(free, key=lambda slot: common[slot])
        # The last token of the prompt is fed in any case: the reply starts from it.
        kept = min(common[best], len(prompt.token_ids) - 1)
        return (best, kept) if kept >= WORTH_KEEPING else (free[-1], 0)

    def _take(self, sequence: _Sequence, token: int) -> None:
        """The model's next token of a sequence: it ends the reply, or goes on it."""
        sequence.kept = len(sequence.prompt.token_ids) + len(sequence.reply)
        if token in self._stop:
            sequence.finish_reason = STOP
            return
        sequence.reply.append(token)
        if len(sequence.reply) == sequence.room:
            sequence.finish_reason = LENGTH

    def _listen(self, fed: Sequence[_Sequence], listener: Listener | None) -> None:
        """What the listener says to the new tokens, on every rank."""
        if not self._listened_to:
            return
        verdicts = [0] * len(fed)
        if listener is not None:
            for i, sequence in enumerate(fed):
                if sequence.finish_reason != STOP:
                    verdicts[i] = _VERDICTS.index(listener.hear(sequence.prompt, sequence.reply[-1]))
        if self._pp.size * self._tp.size > 1:
            told = torch.tensor(verdicts, device=self._stage.place.device)
            if self._pp.is_first:
                _broadcast(told, self._tp, self._tp.ranks[0])
            _broadcast(told, self._pp, self._pp.ranks[0])
            verdicts = told.tolist()
        for sequence, verdict in zip(fed, verdicts, strict=True):
            if verdict:
                sequence.finish_reason = _VERDICTS[verdict]

    # ---- the steps ----

    def _prefill(self, fed: Sequence[_Sequence]) -> list[int]:
        """Feeds the prompts, or what the cache does not hold of them; the first token of each reply."""
        spans = [Span(sequence.slot, sequence.kept, len(sequence.prompt.token_ids)) for sequence in fed]
        ids = [token for sequence in fed for token in sequence.prompt.token_ids[sequence.kept :]]
        hidden = self._steps.prefill(self._received(len(ids)), ids, spans)
        logits = None
        if self._pp.is_last:
            lengths = [span.stop - span.start for span in spans]
            ends = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
            logits = self._stage.head(hidden[ends])
            if self._keep_logits is not None:
                self._hand_over_logits(fed, hidden.split(lengths))
        else:
            self._send(hidden)
        return self._chosen(fed, logits)

    def _decode(self, fed: Sequence[_Sequence]) -> list[int]:
        """Feeds the newest token of each reply; the next one of each."""
        ids = [sequence.reply[-1] for sequence in fed]
        slots, places = [sequence.slot for sequence in fed], [sequence.kept for sequence in fed]
        for slot, token in zip(slots, ids, strict=True):
            self._held[slot].append(token)
        hidden = self._steps.decode(self._received(len(ids)), ids, slots, places)
        if self._pp.is_last:
            return self._chosen(fed, self._stage.head(hidden))
        self._send(hidden)
        return self._chosen(fed, None)

    @property
    def _chooses(self) -> bool:
        return self._pp.is_last and self._tp.is_first

    def _chosen(self, fed: Sequence[_Sequence], logits: torch.Tensor | None) -> list[int]:
        """The next token of each sequence, on every rank, from the logits [n, vocab_size] of the last stage."""
        chosen = torch.empty(len(fed), dtype=torch.int64, device=self._stage.place.device)
        if self._chooses:
            slots = torch.tensor([sequence.slot for sequence in fed], device=logits.device)
            if self._seen is not None:
                logits = self._seen.penalised(logits, slots, self._sampling.repetition_penalty)
            seed = self._sampling.seed
            draws = [draw(seed, sequence.prompt.number, len(sequence.reply)) for sequence in fed]
            chosen = choose(logits, self._sampling, draws)
            if self._seen is not None:
                self._seen.add(slots, chosen)
        if self._pp.is_last:
            _broadcast(chosen, self._tp, self._tp.ranks[0])
        _broadcast(chosen, self._pp, self._pp.ranks[-1])
        tokens = chosen.tolist()
        if NOT_FINITE in tokens:
            number = fed[tokens.index(NOT_FINITE)].prompt.number + 1
            dtype = str(self._stage.place.dtype).removeprefix("torch.")
            raise UserError(
                f"dtype {dtype}: the logits of prompt {number} are not finite: give --dtype bfloat16 or float32, or "
                f"check the weights"
            )
        return tokens

    def _hand_over_logits(self, fed: Sequence[_Sequence], hidden: Sequence[torch.Tensor]) -> None:
        for sequence, its_hidden in zip(fed, hidden, strict=True):
            logits = self._stage.head(its_hidden)
            if self._chooses:
                self._keep_logits(sequence.prompt, logits)

    def _received(self, tokens: int) -> torch.Tensor | None:
        """The hidden states [tokens, hidden_size] of the stage before; None on the first."""
        if self._pp.is_first:
            return None
        place = self._stage.place
        hidden = torch.empty(tokens, self._stage.config.hidden_size, dtype=place.dtype, device=place.device)
        dist.recv(hidden, self._pp.ranks[self._pp.rank - 1], self._pp.group)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        dist.send(hidden, self._pp.ranks[self._pp.rank + 1], self._pp.group)


def _common(held: Sequence[int], token_ids: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for i, (a, b) in enumerate(zip(held, token_ids, strict=False)):
        if a != b:
            return i
    return min(len(held), len(token_ids))


def _broadcast(x: torch.Tensor, axis: Axis, source: int) -> None:
    """x of global rank `source`, on every rank of the axis, in place."""
    if axis.size > 1:
        dist.broadcast(x, source, group=axis.group)
