"""Between the thread that answers HTTP and the one that runs the replica: requests one way, tokens the other.

The replica sees an Inbox and a Listener. What it tells goes to the event loop once a step, to the ticket of each
request.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megalora.generation.requests import INTERRUPTED, Change, Prompt, Reply, Request
from megalora.generation.sampling import Logprobs
from megalora.serving.errors import ApiError

RETRY_SECONDS = 1
STOPPING = "the server is stopping: send the request to another"
_LOOK = 0.2  # seconds between two looks at what a signal handler may have set: it cannot notify


@dataclass(frozen=True)
class Token:
    """The next token of a reply."""

    token_id: int
    logprobs: Logprobs | None


@dataclass(frozen=True)
class End:
    """A reply is whole. finish_reason: of Reply."""

    finish_reason: str


@dataclass
class Ticket:
    """One request on its way. tell: takes its events, on the event loop.

    cancelled  set to leave it off: nothing is told any more
    """

    request: Request
    tell: Callable[[Token | End], None]
    loop: asyncio.AbstractEventLoop
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)


class Backlog:
    """A megalora.generation.requests.Inbox and Listener. slots: requests that run at a time; waiting: that may wait."""

    def __init__(self, slots: int, waiting: int):
        self._slots, self._limit = slots, waiting
        self._numbers = itertools.count()
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._told: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Token | End]]] = {}
        self._changes: deque[tuple[Change, asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._closed, self._ends = False, math.inf

    # ---- for the side of HTTP ----

    def submit(self, requests: Sequence[Request], tell: Callable[[int, Token | End], None]) -> list[Ticket]:
        """Put requests in line, all or none. Raises ApiError 429 where the line is full, 503 where it is closed.

        tell  takes the place of a request among these, and its next event; called on the running event loop
        Their prompts get numbers of their own.
        """
        loop = asyncio.get_running_loop()
        with self._changed:
            self.check(len(requests))
            tickets = []
            for place, request in enumerate(requests):
                numbered = replace(request, prompt=replace(request.prompt, number=next(self._numbers)))
                tickets.append(Ticket(numbered, functools.partial(tell, place), loop))
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def check(self, count: int) -> None:
        """Raise ApiError where so many requests could not be submitted now."""
        with self._changed:
            if self._closed:
                raise ApiError(503, STOPPING)
            if len(self._waiting) + count > self._limit + max(0, self._slots - len(self._running)):
                raise ApiError(429, f"{len(self._waiting)} requests wait already: try again later", None, "queue_full")

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Leave requests off: those that run end with their next token, or the next part of their prompt."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            if any(ticket.cancelled for ticket in self._waiting):
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)

    def counts(self) -> tuple[int, int]:
        """Return how many requests (run, wait)."""
        with self._changed:
            return len(self._running), len(self._waiting)

    @property
    def open(self) -> tuple[int, int]:
        """As `counts`, about, and without a lock: for a signal handler."""
        return len(self._running), len(self._waiting)

    def close(self, seconds: float = math.inf) -> None:
        """Take no more requests; those that are there are replied to, within so many seconds. Without a lock or a
        thread: for a signal handler.
        """
        self._closed, self._ends = True, time.monotonic() + seconds

    def abort(self) -> None:
        """Take no more requests, and end those that are there as `cancel` does. Without a lock too."""
        self._closed, self._ends = True, -math.inf

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def _aborted(self) -> bool:
        return time.monotonic() >= self._ends

    def uses(self, adapter: int) -> bool:
        """Return whether a request of an adapter runs or waits."""
        with self._changed:
            tickets = (*self._waiting, *self._running.values())
            return any(ticket.request.prompt.adapter == adapter for ticket in tickets)

    async def make(self, change: Change) -> None:
        """Have the replica make a change, before its next step. Raises ApiError 503 where it stops before that."""
        loop = asyncio.get_running_loop()
        made: asyncio.Future[None] = loop.create_future()
        with self._changed:
            if self._closed:
                raise ApiError(503, STOPPING)
            self._changes.append((change, loop, made))
            self._changed.notify()
        await made

    # ---- for the replica ----

    def wait(self, seconds: float) -> list[Request] | None:
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self.waiting():
                left = deadline - time.monotonic()
                if self._closed:
                    return None
                if left <= 0 or self._changes:
                    return []
                self._changed.wait(min(left, _LOOK))
            return self._taken(self._slots)

    def waiting(self) -> bool:
        if self._aborted:
            self.end_all()
        self._flush()
        return bool(self._waiting)

    def take(self, count: int) -> list[Request]:
        with self._changed:
            return self._taken(count)

    def changing(self) -> bool:
        return bool(self._changes)

    def change(self) -> Change | None:
        return self._changes[0][0] if self._changes else None

    def changed(self) -> None:
        with self._changed:
            _, loop, made = self._changes.popleft()
        _settle(loop, made, None)

    def hear(self, prompt: Prompt, token_id: int, logprobs: Logprobs | None) -> str | None:
        if self.left(prompt):
            return INTERRUPTED
        self._event(self._running[prompt.number], Token(token_id, logprobs))
        return None

    def left(self, prompt: Prompt) -> bool:
        return self._running[prompt.number].cancelled or self._aborted

    def done(self, prompt: Prompt, reply: Reply) -> None:
        with self._changed:
            ticket = self._running.pop(prompt.number)
        self._event(ticket, End(reply.finish_reason))
        self._flush()

    def end_all(self, running: bool = False) -> None:
        """Tell those who wait, or all, that there will be no reply (any more)."""
        self._closed = True
        with self._changed:
            tickets, self._waiting = [*self._waiting, *(self._running.values() if running else ())], deque()
            changes, self._changes = self._changes, deque()
        for _, loop, made in changes:
            _settle(loop, made, ApiError(503, STOPPING))
        for ticket in tickets:
            self._event(ticket, End(INTERRUPTED))
        self._flush()

    def _taken(self, count: int) -> list[Request]:
        taken = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        self._running.update((ticket.request.prompt.number, ticket) for ticket in taken)
        return [ticket.request for ticket in taken]

    def _event(self, ticket: Ticket, event: Token | End) -> None:
        if not ticket.cancelled:
            self._told.setdefault(ticket.loop, []).append((ticket, event))

    def _flush(self) -> None:
        told, self._told = self._told, {}
        for loop, events in told.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, events)


def _settle(loop: asyncio.AbstractEventLoop, made: asyncio.Future[None], error: ApiError | None) -> None:
    """Tell whoever waits for a change that it is made, or why it never will be."""

    def tell() -> None:
        if not made.done():
            made.set_result(None) if error is None else made.set_exception(error)

    if not loop.is_closed():
        loop.call_soon_threadsafe(tell)


def _deliver(events: Sequence[tuple[Ticket, Token | End]]) -> None:
    for ticket, event in events:
        if not ticket.cancelled:
            ticket.tell(event)
