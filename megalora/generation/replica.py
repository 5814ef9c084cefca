"""The stages of one copy of the model (its pp x tp ranks) as a thing that replies.

Every rank of a replica holds the same sequences and runs the same steps: a step takes the new tokens of the running
sequences through the stages, and the last one says which token comes next to all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megalora.errors import UserError
from megalora.generation.cache import CachedStep, KVCache, Span
from megalora.generation.sampling import NOT_FINITE, Sampling, choose, draw
from megalora.models.inputs import Inputs, rope_tables
from megalora.models.stage import Stage
from megalora.parallel.linear import Tokens
from megalora.parallel.mesh import Axis

MAX_RUNNING = 32  # sequences that run at a time,
CACHE_TOKENS = 32768  # as far as the cache, of this many tokens, holds them
STEP_TOKENS = 8192  # prompts join a step up to this many tokens: it bounds the memory of the activations


@dataclass(frozen=True)
class Prompt:
    """number: of the prompt in the run, which its random numbers come from; token_ids: at least one."""

    number: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class Reply:
    """token_ids without the one that stopped it; finish_reason: "stop", or "length" where it was cut off."""

    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass
class _Sequence:
    """A prompt under way. kept: tokens in the cache; pending: those to feed next; room: longest reply."""

    prompt: Prompt
    slot: int
    room: int
    pending: Sequence[int]
    kept: int = 0
    reply: list[int] = field(default_factory=list)


class Replica:
    """stage, pp, tp    this rank's part of the model, and the ranks of the others
    context          longest prompt and reply together, in tokens
    stop_token_ids   each of them ends a reply
    """

    def __init__(
        self, stage: Stage, pp: Axis, tp: Axis, context: int, sampling: Sampling, stop_token_ids: Collection[int]
    ):
        stage.refresh_adapters()
        self._stage, self._pp, self._tp = stage, pp, tp
        self._context, self._sampling, self._stop = context, sampling, frozenset(stop_token_ids)

    @torch.inference_mode()
    def replies(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Reply]:
        """The reply to each prompt, in order. Collective over the replica, with the same prompts on every rank.

        Prompts run together as far as there is room; one that ends makes place for the next.
        Raises UserError, on every rank, where a token has no embedding or the logits are not finite.
        """
        if not prompts:
            return []
        largest, words = max(max(p.token_ids) for p in prompts), self._stage.config.vocab_size
        if largest >= words:
            raise UserError(
                f"the tokenizer gives token id {largest}, but the model's vocab_size ({words}) ends before: take "
                f"tokenizer and model from one folder"
            )
        capacity = min(self._context, max(len(p.token_ids) for p in prompts) + max_new_tokens)
        slots = min(len(prompts), MAX_RUNNING, max(1, CACHE_TOKENS // capacity))
        cache = KVCache(slots, capacity)
        positions = torch.arange(capacity, device=self._stage.place.device)
        rope = rope_tables(self._stage.config, positions, self._stage.place.dtype)
        waiting, free, running = deque(prompts), list(range(slots)), []
        done: dict[int, Reply] = {}
        while waiting or running:
            fed = len(running)
            while waiting and free and (fed == 0 or fed + len(waiting[0].token_ids) <= STEP_TOKENS):
                prompt = waiting.popleft()
                room = min(max_new_tokens, self._context - len(prompt.token_ids))
                assert room > 0, "a prompt must be shorter than the context"
                running.append(_Sequence(prompt, free.pop(), room, prompt.token_ids))
                fed += len(prompt.token_ids)
            for sequence, token in zip(running, self._step(running, cache, rope), strict=True):
                sequence.kept += len(sequence.pending)
                sequence.pending = (token,)
                stopped = token in self._stop
                if not stopped:
                    sequence.reply.append(token)
                if stopped or len(sequence.reply) == sequence.room:
                    reason = "stop" if stopped else "length"
                    done[sequence.prompt.number] = Reply(tuple(sequence.reply), reason)
                    free.append(sequence.slot)
            running = [sequence for sequence in running if sequence.prompt.number not in done]
        return [done[prompt.number] for prompt in prompts]

    def _step(self, running: Sequence[_Sequence], cache: KVCache, rope: tuple[torch.Tensor, ...]) -> list[int]:
        """Feeds the pending tokens of the sequences; the next token of each."""
        inputs, ends = self._inputs(running, cache, rope)
        hidden = self._stage(self._received(len(inputs.input_ids)), inputs)
        chosen = torch.empty(len(running), dtype=torch.int64, device=self._stage.place.device)
        if self._pp.is_last:
            logits = self._stage.lm_head(hidden[ends])
            if self._tp.is_first:
                seed = self._sampling.seed
                draws = [draw(seed, sequence.prompt.number, len(sequence.reply)) for sequence in running]
                chosen = choose(logits, self._sampling, draws)
            _broadcast(chosen, self._tp, self._tp.ranks[0])
        else:
            dist.send(hidden, self._pp.ranks[self._pp.rank + 1], self._pp.group)
        _broadcast(chosen, self._pp, self._pp.ranks[-1])
        tokens = chosen.tolist()
        if NOT_FINITE in tokens:
            number = running[tokens.index(NOT_FINITE)].prompt.number + 1
            dtype = str(self._stage.place.dtype).removeprefix("torch.")
            raise UserError(
                f"dtype {dtype}: the logits of prompt {number} are not finite: give --dtype bfloat16 or float32, or "
                f"check the weights"
            )
        return tokens

    def _inputs(
        self, running: Sequence[_Sequence], cache: KVCache, rope: tuple[torch.Tensor, ...]
    ) -> tuple[Inputs, torch.Tensor]:
        """What the layers read, and where in it the last token of each sequence stands."""
        device = self._stage.place.device
        ids, positions, bounds, spans = [], [], [0], []
        for sequence in running:
            stop = sequence.kept + len(sequence.pending)
            ids += sequence.pending
            positions += range(sequence.kept, stop)
            bounds.append(len(ids))
            spans.append(Span(sequence.slot, sequence.kept, stop))
        at = torch.tensor(positions, device=device)
        cos, sin = (table[at] for table in rope)
        tokens = Tokens(at, at, seed=None, step=0)  # no dropout, so nothing is drawn from them
        input_ids = torch.tensor(ids, device=device)
        step = CachedStep(cache, spans)
        ends = torch.tensor(bounds[1:], device=device) - 1
        return Inputs(input_ids, None, None, tuple(bounds), cos, sin, tokens, step), ends

    def _received(self, tokens: int) -> torch.Tensor | None:
        """The hidden states [tokens, hidden_size] of the stage before; None on the first."""
        if self._pp.is_first:
            return None
        place = self._stage.place
        hidden = torch.empty(tokens, self._stage.config.hidden_size, dtype=place.dtype, device=place.device)
        dist.recv(hidden, self._pp.ranks[self._pp.rank - 1], self._pp.group)
        return hidden


def _broadcast(x: torch.Tensor, axis: Axis, source: int) -> None:
    """x of global rank `source`, on every rank of the axis, in place."""
    if axis.size > 1:
        dist.broadcast(x, source, group=axis.group)
