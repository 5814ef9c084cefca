"""The stages of one copy of the model (its pp x tp ranks) as a thing that replies.

Every rank of a replica holds the same sequences and runs the same steps. Prompts that find a free slot of the cache
are fed in one step together; then all running sequences go on by one token a step. A prompt of more than STEP_TOKENS
tokens is fed in parts of so many, and between two of them the running sequences go on, and other prompts enter: its
activations take no more memory than those of a short one, and nobody waits for all of it. The last stage says which
token comes next to all; whoever listens on the first rank may end a reply before the model does.

`replies` replies to prompts that are all there; `serve` to requests as they come, each with a sampling of its own and,
where the stage shares several adapters, by the adapter that it names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch
import torch.distributed as dist

from megalora.batch import to_device
from megalora.errors import UserError
from megalora.generation.cache import Span
from megalora.generation.choosing import Chooser, Underway, broadcast
from megalora.generation.held import Held
from megalora.generation.requests import (
    FAILED,
    INTERRUPTED,
    LENGTH,
    STOP,
    Change,
    Inbox,
    Listener,
    Prompt,
    Reply,
    Request,
)
from megalora.generation.sampling import NOT_FINITE, Sampling
from megalora.generation.sequences import Ongoing, Queue
from megalora.generation.steps import Steps
from megalora.models.stage import Stage
from megalora.parallel.collectives import broadcast_object
from megalora.parallel.embedding import VocabParallelHead
from megalora.parallel.mesh import Axis

MAX_RUNNING = 64  # sequences that run at a time,
CACHE_TOKENS = 32768  # as far as the cache, of this many tokens, holds them
FEW = 8  # where no more run, each may have a share of the cache as if they were so many: a dialogue seldom outgrows it
STEP_TOKENS = 8192  # prompts join a step up to this many tokens, and longer ones are cut: the memory of activations
REFILL = 8  # new prompts join when one slot in this many is free: few steps, each of many tokens
WORTH_KEEPING = 32  # a prompt that begins with at least this many tokens of what a free slot holds goes on from there

KEEP_ALIVE = 60.0  # seconds that the ranks wait for a request before they tell one another that there is none

_VERDICTS = (None, STOP, INTERRUPTED)  # of a listener, as they are told to the other ranks


class Replica:
    """stage, pp, tp    this rank's part of the model, and the ranks of the others
    context          longest prompt and reply together, in tokens
    stop_token_ids   each of them ends a reply
    listened_to      whether the first rank (of pp and tp) brings a Listener
    fp8_cache        keys and values are kept in 8 bits
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
        fp8_cache: bool = False,
        keep_logits: Callable[[Prompt, torch.Tensor], None] | None = None,
    ):
        stage.refresh_adapters()
        self._stage, self._pp, self._tp = stage, pp, tp
        self._context, self._sampling, self._stop = context, sampling, frozenset(stop_token_ids)
        self._listened_to, self._keep_logits, self._fp8 = listened_to, keep_logits, fp8_cache
        self._steps: Steps | None = None
        self._held = Held(0, False)
        self._chooser = Chooser(pp, tp, stage.place.device)
        self._underway: Underway | None = None  # a step that runs ahead of what the host knows
        self._adapted = True
        self._more = self._changes = False  # whether requests, or a change of adapters, wait in the inbox

    def switch_adapter(self, on: bool) -> None:
        """Give from now on the replies of the adapted model, as at first, or of the base."""
        if on != self._adapted:
            self._adapted, self._underway = on, None
            self._stage.switch_adapters(on)
            if self._steps is not None:
                self._steps.adapters_switched()
            self._held.forget()  # keys and values are another model's now

    @torch.inference_mode()
    def replies(self, prompts: Sequence[Prompt], max_new_tokens: int, listener: Listener | None = None) -> list[Reply]:
        """Return the reply to each prompt, in order. Collective over the replica, with the same prompts on every rank.

        Prompts run together as far as there is room; one that ends makes place for the next.
        Raises UserError, on every rank, where a token has no embedding or the logits are not finite.
        """
        if not prompts:
            return []
        self._underway = None
        self._make_room(prompts, max_new_tokens)
        requests = (Request(prompt, self._sampling, max_new_tokens, self._stop) for prompt in prompts)
        queue = Queue([*range(self._steps.slots)], deque(requests))
        try:
            return self._all_replies(queue, prompts, listener)
        except BaseException:  # slots that were left half-way hold other tokens than is noted
            self._held.forget()
            raise

    def _all_replies(self, queue: Queue, prompts: Sequence[Prompt], listener: Listener | None) -> list[Reply]:
        done: dict[int, Reply] = {}
        while not queue.rests:
            for sequence in self._advance(queue, listener):
                if sequence.finish_reason == FAILED:
                    raise self._not_finite(sequence.prompt)
                done[sequence.prompt.number] = reply = sequence.said
                if listener is not None:
                    listener.done(sequence.prompt, reply)
        return [done[prompt.number] for prompt in prompts]

    def reserve(self, slots: int, capacity: int) -> int:
        """Make the cache that `serve` needs: `slots` sequences at a time, each of up to `capacity` tokens. Return its
        bytes on this rank.

        Raises UserError where a GPU has no room for it: it is allocated by the first prompt, when it is too late.
        """
        self._context = min(self._context, capacity)
        self._renew_cache(slots, self._context)
        self._chooser.remember(slots, self._stage.config.vocab_size)
        needed, room = self._steps.cache_bytes, _free_memory(torch.device(self._stage.place.device))
        if room is not None and needed > room:
            rounded = "" if self._fp8 else ", or --kv_cache fp8"
            raise UserError(
                f"keys and values of {slots} requests of {self._context} tokens need {needed / 2**30:.1f} GiB on a "
                f"GPU, and {room / 2**30:.1f} are free beside the model",
                f"give a smaller --max_running or --seq_length{rounded}, or more ranks to the copy of the model",
            )
        return needed

    @torch.inference_mode()
    def serve(
        self,
        inbox: Inbox | None,
        listener: Listener | None,
        world: Axis,
        put: Callable[[Change], None] | None = None,
    ) -> None:
        """Reply to requests as they come, until the inbox says that no more will. Collective over `world`.

        world  this replica alone; inbox and listener are its first rank's
        put    makes a change of the adapters on this rank's stage; None: the inbox brings none
        A request whose logits are not finite ends as FAILED, and the others go on. After `reserve`.
        """
        queue = Queue([*range(self._steps.slots)])
        while True:
            if queue.rests:
                news = None if inbox is None else (inbox.wait(KEEP_ALIVE), inbox.change())
                found, change = broadcast_object(news, world)
                if change is not None:
                    self._change(change, put, inbox)
                if found is None:
                    return
                queue.waiting.extend(found)
                self._more = self._changes = False
                continue
            if self._changes:
                change = broadcast_object(None if inbox is None else inbox.change(), world)
                self._change(change, put, inbox)
                self._changes = False
            if self._more and self._joins(queue) and not queue.waiting:
                queue.waiting.extend(broadcast_object([] if inbox is None else inbox.take(len(queue.free)), world))
            for sequence in self._advance(queue, listener, inbox):
                if listener is not None:
                    listener.done(sequence.prompt, sequence.said)

    def _change(self, change: Change, put: Callable[[Change], None], inbox: Inbox | None) -> None:
        """Make a change of the adapters, which no running sequence uses."""
        put(change)
        self._held.forget(change.number)  # keys and values of the adapter that was there are of no use
        if inbox is not None:
            inbox.changed()

    def _advance(self, queue: Queue, listener: Listener | None, inbox: Inbox | None = None) -> list[Ongoing]:
        """Make one step: of new prompts, or of all running sequences. Return those that it ends."""
        if queue.waiting and self._joins(queue):
            queue.entering.append(self._seat(queue))
        if queue.entering and not (queue.turn and queue.running):
            fed, tokens = self._enter(queue)
        else:
            queue.turn = False
            fed, tokens = self._decode(list(queue.running))
        for sequence, token in zip(fed, tokens, strict=True):
            self._take(sequence, token)
        self._listen(fed, queue, listener, inbox)
        ended = queue.remove_ended()
        for sequence in (one for one in ended if not one.reply):  # left before all was fed: its slot holds a part
            self._held.cut(sequence.slot, sequence.kept)
        return ended

    # ---- who runs ----

    def _make_room(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Make a cache that holds as many of the prompts and their replies as may run together; the last one if it
        does.
        """
        largest, words = max(max((*p.token_ids, *p.source)) for p in prompts), self._stage.config.vocab_size
        if largest >= words:
            raise UserError(
                f"the tokenizer gives token id {largest}, but the model's vocab_size ({words}) ends before",
                "take tokenizer and model from one folder",
            )
        capacity = min(self._context, max(len(p.token_ids) for p in prompts) + max_new_tokens)
        source = max(len(p.source) for p in prompts)
        slots = min(len(prompts), MAX_RUNNING, max(1, CACHE_TOKENS // (capacity + source)))
        if self._holds(slots, capacity, source):
            return
        if slots <= FEW:
            capacity = min(self._context, max(2 * capacity, CACHE_TOKENS // FEW))
        self._renew_cache(slots, capacity, source)
        if self._sampling.repetition_penalty != 1.0:
            self._chooser.remember(slots, words)

    def _holds(self, slots: int, capacity: int, source: int) -> bool:
        """Return whether the cache has as much room."""
        there = self._steps
        if there is None:
            return False
        return there.slots >= slots and there.capacity >= capacity and there.source_capacity >= source

    def _renew_cache(self, slots: int, capacity: int, source: int = 0) -> None:
        self._steps = self._underway = None  # before the next one is made: there may not be room for both
        self._steps = Steps(self._stage, slots, capacity, source, self._fp8)
        self._held = Held(slots, self._steps.recurrent)

    def _joins(self, queue: Queue) -> bool:
        """Return whether prompts that wait are to enter."""
        if not queue.running and not queue.entering:
            return True
        return len(queue.free) >= max(1, self._steps.slots // REFILL)

    def _seat(self, queue: Queue) -> list[Ongoing]:
        """Take waiting prompts into free slots, as many as one step feeds."""
        seated: list[Ongoing] = []
        fed, waiting, free = 0, queue.waiting, queue.free
        while waiting and free and (fed == 0 or fed + waiting[0].prompt.fed <= STEP_TOKENS):
            request = waiting.popleft()
            prompt = request.prompt
            room = min(request.max_new_tokens, self._context - len(prompt.token_ids))
            assert room > 0, "a prompt must be shorter than the context"
            slot, kept = self._slot_for(prompt, free)
            free.remove(slot)
            self._held.seat(slot, prompt)
            seated.append(Ongoing(request, slot, room, kept))
            self._chooser.begin(seated[-1])
            fed += prompt.fed - kept
        return seated

    def _slot_for(self, prompt: Prompt, free: Sequence[int]) -> tuple[int, int]:
        """Return (slot, tokens of the prompt that it holds already), in a dialogue the turns before."""
        if self._keep_logits is not None or prompt.source:  # of all tokens: all are fed; or keys are of the source
            return free[-1], 0
        may = [slot for slot in free if self._steps.goes_on(slot, len(prompt.token_ids))]
        return self._held.best(prompt, may, WORTH_KEEPING) or (free[-1], 0)

    def _take(self, sequence: Ongoing, token: int) -> None:
        """Take the model's next token of a sequence: it ends the reply, or goes on it."""
        sequence.kept = len(sequence.prompt.token_ids) + len(sequence.reply)
        if token in sequence.request.stop_token_ids or token == NOT_FINITE:
            sequence.finish_reason = FAILED if token == NOT_FINITE else STOP
            return
        sequence.reply.append(token)
        if len(sequence.reply) == sequence.room:
            sequence.finish_reason = LENGTH

    def _listen(self, fed: Sequence[Ongoing], queue: Queue, listener: Listener | None, inbox: Inbox | None) -> None:
        """Ask which replies the new tokens end, who has left, and whether the inbox has requests; on every rank."""
        unfed = queue.unfed
        if not self._listened_to:
            return
        verdicts = [0] * (len(fed) + len(unfed))
        if listener is not None:
            for i, sequence in enumerate(fed):
                if sequence.finish_reason not in (STOP, FAILED):
                    verdict = listener.hear(sequence.prompt, sequence.reply[-1], sequence.logprobs)
                    verdicts[i] = _VERDICTS.index(verdict)
            verdicts[len(fed) :] = [_VERDICTS.index(INTERRUPTED) * listener.left(one.prompt) for one in unfed]
        verdicts += [int(inbox is not None and inbox.waiting()), int(inbox is not None and inbox.changing())]
        if self._pp.size * self._tp.size > 1:
            told = torch.tensor(verdicts, device=self._stage.place.device)
            if self._pp.is_first:
                broadcast(told, self._tp, self._tp.ranks[0])
            broadcast(told, self._pp, self._pp.ranks[0])
            verdicts = told.tolist()
        *verdicts, more, changes = verdicts
        self._more, self._changes = bool(more), bool(changes)
        for sequence, number in zip((*fed, *unfed), verdicts, strict=True):
            if number:
                sequence.finish_reason = _VERDICTS[number]

    # ---- the steps ----

    def _enter(self, queue: Queue) -> tuple[list[Ongoing], list[int]]:
        """Feed prompts that enter, or the next part of a long one. Return those that are whole then, and the first
        token of each reply.
        """
        fed = queue.entering.popleft()
        spans = [sequence.part(STEP_TOKENS) for sequence in fed]
        hidden = self._prefill(fed, spans)
        whole = [i for i, one in enumerate(fed) if spans[i].stop == len(one.prompt.token_ids)]
        assert len(whole) in (0, len(fed)), "a prompt that is cut enters alone"
        for sequence, span in zip(fed, spans, strict=True):
            sequence.kept = span.stop
        queue.turn = not whole or bool(queue.entering)
        if not whole:
            queue.entering.append(fed)
            return [], []
        queue.running += fed
        logits = None
        if hidden is not None:
            ends = torch.tensor([span.stop - span.start for span in spans], device=hidden.device).cumsum(0) - 1
            logits = self._head(hidden[ends])
        return fed, self._chosen(fed, logits)

    def _prefill(self, fed: Sequence[Ongoing], spans: Sequence[Span]) -> torch.Tensor | None:
        """Feed these spans of the prompts, and with the last one hand their logits over; return the hidden states on
        the last stage."""
        ids = [t for one, span in zip(fed, spans, strict=True) for t in one.prompt.token_ids[span.start : span.stop]]
        adapters = [sequence.prompt.adapter for sequence in fed]
        sources = [sequence.prompt.source for sequence in fed if sequence.prompt.source]
        received = self._received(len(ids) + sum(map(len, sources)))
        lengths = [len(sequence.prompt.token_ids) for sequence in fed]
        pictures = [sequence.prompt.picture for sequence in fed]
        hidden = self._steps.prefill(received, ids, spans, adapters, sources, lengths, pictures)
        if not self._pp.is_last:
            self._send(hidden)
            return None
        if self._keep_logits is not None:
            for sequence, span, part in zip(fed, spans, hidden.split([s.stop - s.start for s in spans]), strict=True):
                sequence.parts.append(part)
                if span.stop == len(sequence.prompt.token_ids):
                    self._hand_over_logits(sequence)
        return hidden

    def _decode(self, running: list[Ongoing]) -> tuple[list[Ongoing], list[int]]:
        """Feed the newest token of each reply; return the sequences that went on, and the next token of each.

        Where one GPU does all, the step after is under way before the host knows of these tokens, and what the host
        does between two steps takes no time of it. What a step says of a reply that has ended is left; that its slot
        has read one more token is noted, for a state cannot be taken back.
        """
        step, self._underway = self._underway, None
        fed = [] if step is None else step.of(running)
        logits = None
        if step is None or not fed:
            fed = running
            tokens = [sequence.reply[-1] for sequence in fed]
            logits, step = self._launch(fed, tokens, [sequence.kept for sequence in fed])
            self._held.read(fed, tokens)
        if self._steps.runs_ahead and len(fed) == len(running) and all(one.request.logprobs is None for one in fed):
            self._run_ahead(step, fed)
        self._chooser.tell_logprobs(fed, logits, step.chosen)
        tokens = step.tokens(fed)
        if self._underway is not None:
            self._held.read(self._underway.fed, step.tokens(self._underway.fed))
        return fed, tokens

    def _run_ahead(self, step: Underway, fed: Sequence[Ongoing]) -> None:
        """Launch the step that feeds the tokens of `step`, for those of `fed` that are not at their end with them."""
        goes_on = [one for one in fed if len(one.reply) + 1 < one.room]
        if not goes_on:
            return
        tokens = step.chosen.clamp(min=0)  # what is not finite ends the reply
        if len(goes_on) < len(step.fed):
            rows = {id(one): row for row, one in enumerate(step.fed)}
            tokens = tokens[to_device(torch.tensor([rows[id(one)] for one in goes_on]), tokens.device)]
        places = [len(one.prompt.token_ids) + len(one.reply) for one in goes_on]
        _, self._underway = self._launch(goes_on, tokens, places, ahead=1)

    def _launch(
        self, fed: Sequence[Ongoing], tokens: Sequence[int] | torch.Tensor, places: Sequence[int], ahead: int = 0
    ) -> tuple[torch.Tensor | None, Underway]:
        """Launch the step that feeds a token of each sequence, which takes its place; return the logits [n, vocab_size]
        on the last stage, and the step. ahead: as Chooser.choose takes it."""
        slots, adapters = [one.slot for one in fed], [one.prompt.adapter for one in fed]
        hidden = self._steps.decode(self._received(len(fed)), tokens, slots, places, adapters)
        logits = None
        if self._pp.is_last:
            logits = self._head(hidden)
        else:
            self._send(hidden)
        return logits, Underway(fed, self._chooser.choose(fed, logits, ahead))

    @property
    def _head(self) -> VocabParallelHead:
        head = self._stage.head
        assert isinstance(head, VocabParallelHead), "a model that writes text"
        return head

    def _chosen(self, fed: Sequence[Ongoing], logits: torch.Tensor | None) -> list[int]:
        """Return the next token of each sequence, on every rank, from the logits [n, vocab_size] of the last stage."""
        chosen = self._chooser.choose(fed, logits)
        self._chooser.tell_logprobs(fed, logits, chosen)
        return chosen.tolist()

    def _not_finite(self, prompt: Prompt) -> UserError:
        dtype = str(self._stage.place.dtype).removeprefix("torch.")
        return UserError(
            f"dtype {dtype}: the logits of prompt {prompt.number + 1} are not finite",
            f"give --dtype {'float32' if dtype == 'bfloat16' else 'bfloat16 or float32'}, or check the weights",
        )

    def _hand_over_logits(self, sequence: Ongoing) -> None:
        logits = self._head(torch.cat(sequence.parts))
        sequence.parts.clear()
        if self._chooser.chooses:
            self._keep_logits(sequence.prompt, logits)

    def _received(self, tokens: int) -> torch.Tensor | None:
        """Return the hidden states [tokens, hidden_size] of the stage before; None on the first."""
        if self._pp.is_first:
            return None
        place = self._stage.place
        hidden = torch.empty(tokens, self._stage.config.hidden_size, dtype=place.dtype, device=place.device)
        dist.recv(hidden, self._pp.ranks[self._pp.rank - 1], self._pp.group)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        dist.send(hidden, self._pp.ranks[self._pp.rank + 1], self._pp.group)


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a GPU, those that torch holds unused too; None on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
