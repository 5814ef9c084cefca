"""The replies to one HTTP request: from the tokens that the replica tells to parts of text, reply by reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from megalora.generation.requests import FAILED, INTERRUPTED, LENGTH, Prompt, Request
from megalora.generation.sampling import Logprobs
from megalora.generation.text import Following, Piece
from megalora.serving.backlog import Backlog, End, Ticket, Token
from megalora.serving.bodies import Asked
from megalora.serving.errors import ApiError, bad
from megalora.serving.metrics import ServerMetrics
from megalora.serving.models import Catalogue, ServedModel
from megalora.serving.toolcalls import Call, CallReader


@dataclass(frozen=True)
class Part:
    """Some of one reply.

    calls          of tools
    tokens         with their log-probabilities, where these are asked for
    finish_reason  "stop", "length" or "tool_calls", with its last part
    """

    choice: int
    content: str
    reasoning: str
    calls: tuple[Call, ...] = ()
    tokens: tuple[tuple[int, Logprobs], ...] = ()
    finish_reason: str | None = None


@dataclass
class _Choice:
    """One reply under way. held: tokens whose log-probabilities no part has told yet."""

    following: Following
    calls: CallReader
    tokens: int = 0
    held: list[tuple[int, Logprobs]] = field(default_factory=list)
    ended: bool = False


class Replies:
    """Submits the prompts of a request, n times each, and reads what comes. Choices are numbered prompt by prompt.

    Raises ApiError where they cannot be submitted.
    """

    def __init__(
        self,
        asked: Asked,
        model: ServedModel,
        prompts: Sequence[Prompt],
        catalogue: Catalogue,
        backlog: Backlog,
        metrics: ServerMetrics,
    ):
        if catalogue.find(model.name) is not model:  # its place may be another adapter's by now
            raise ApiError(404, f"{model.name} was loaded anew: send the request again", "model", "model_not_found")
        self.asked, self.model = asked, model
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._backlog, self._metrics, self._started = backlog, metrics, time.monotonic()
        self._events: asyncio.Queue[tuple[int, Token | End]] = asyncio.Queue()
        chat = asked.conversation is not None
        tools = asked.conversation.tools if chat else ()
        reader = catalogue.tool_reader if tools else catalogue.reader
        stops = {*model.stop_token_ids, *(catalogue.special[stop] for stop in asked.stop if stop in catalogue.special)}
        self._choices = []
        requests: list[Request] = []
        for one in prompts:
            ids = one.token_ids
            if max(ids) >= catalogue.words or min(ids) < 0:
                raise bad(f"prompt has a token id that is not from 0 to {catalogue.words - 1}", "prompt")
            room = catalogue.context - len(ids)
            for _ in range(asked.choices):
                prompt = replace(one, stream=len(requests))
                longest = min(asked.max_new_tokens or room, room)
                requests.append(Request(prompt, asked.sampling, longest, frozenset(stops), asked.logprobs))
                self._choices.append(_Choice(reader.follow(prompt, asked.stop, thinking=chat), CallReader(tools)))
        self._tickets: list[Ticket] = backlog.submit(requests, lambda *event: self._events.put_nowait(event))

    @property
    def tokens(self) -> int:
        """How many tokens the replies have so far."""
        return sum(choice.tokens for choice in self._choices)

    async def parts(self) -> AsyncIterator[Part]:
        """Yield the parts of all replies as they come. Raises ApiError 500 where one fails. Leaving off cancels the
        rest.
        """
        left, first = len(self._choices), True
        try:
            while left:
                place, event = await self._events.get()
                if first and isinstance(event, Token):
                    first = False
                    self._metrics.first_token(time.monotonic() - self._started)
                part = self._token(place, event) if isinstance(event, Token) else self._end(place, event)
                if part is not None:
                    left -= part.finish_reason is not None
                    yield part
            seconds = time.monotonic() - self._started
            self._metrics.replied(self.model.name, self.prompt_tokens, self.tokens, seconds)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Leave off what is not whole."""
        left = [ticket for ticket, choice in zip(self._tickets, self._choices, strict=True) if not choice.ended]
        if left:
            self._backlog.cancel(left)

    def _token(self, place: int, token: Token) -> Part | None:
        choice = self._choices[place]
        if choice.ended:
            return None
        choice.tokens += 1
        if token.logprobs is not None:
            choice.held.append((token.token_id, token.logprobs))
        pieces = choice.following.add(token.token_id)
        if choice.following.stopped:
            self._backlog.cancel([self._tickets[place]])
            choice.ended = True
            return self._part(place, [*pieces, *choice.following.rest()], "stop")
        return self._part(place, pieces) if pieces else None

    def _end(self, place: int, end: End) -> Part | None:
        choice = self._choices[place]
        if choice.ended:
            return None
        choice.ended = True
        if end.finish_reason == FAILED:
            raise ApiError(500, f"the logits of {self.model.name} are not finite: check its weights and the dtype")
        if end.finish_reason == INTERRUPTED:
            raise ApiError(503, "the server stopped before the reply was whole")
        return self._part(place, choice.following.rest(), "length" if end.finish_reason == LENGTH else "stop")

    def _part(self, place: int, pieces: Sequence[Piece], finish_reason: str | None = None) -> Part | None:
        choice = self._choices[place]
        reasoning = "".join(piece.text for piece in pieces if piece.thinking)
        found = choice.calls.add("".join(piece.text for piece in pieces if not piece.thinking))
        if finish_reason is not None:
            found += choice.calls.rest()
            if finish_reason == "stop" and choice.calls.count:
                finish_reason = "tool_calls"
        content = "".join(one for one in found if isinstance(one, str))
        calls = tuple(one for one in found if isinstance(one, Call))
        if not (content or reasoning or calls or finish_reason):
            return None  # all of it is held back
        tokens, choice.held = tuple(choice.held), []
        return Part(place, content, reasoning, calls, tokens, finish_reason)

