"""Runs action lists without a process: when each action starts and ends, and whether they end at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from megalora.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    FORWARD,
    RECOMPUTE,
    SEND_FORWARD,
    SENDS,
    Action,
    input_of,
    other_end,
)


class ScheduleError(AssertionError):
    """Action lists that cannot be run: our own mistake, never the user's."""


class StandsStill(ScheduleError):
    """Every stage that has not ended waits for another."""


class Event(NamedTuple):
    """An action of a stage, in seconds from the start of the step. A send ends when its message has arrived."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a step takes.

    events    in the order of their starts; receives are not among them
    makespan  seconds until the last compute ends
    busy      seconds of compute of each stage
    """

    events: tuple[Event, ...]
    makespan: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they wait."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0


def simulate(
    lists: Sequence[Sequence[Action]],
    seconds: Callable[[int, Action], float],
    latency: float = 0.0,
    buffered: bool = True,
) -> Timeline:
    """Run the action list of each stage.

    seconds(stage, action)  of a forward, recompute or backward; of a send, how long it occupies the line between two
                            stages, which carries one message at a time in each direction and of each kind
    latency                 seconds from when a message has left until it is there
    buffered                True, as the runner does it: a send is handed over and a compute waits for what it reads.
                            False, the strictest: a send ends when its receive has, and either stops its stage
    Raises StandsStill where stages wait for one another for ever, ScheduleError where an action comes before what it
    needs, twice, or to nobody.
    """
    return _Machine(lists, seconds, latency, buffered).run()


class _Machine:
    def __init__(
        self,
        lists: Sequence[Sequence[Action]],
        seconds: Callable[[int, Action], float],
        latency: float,
        buffered: bool,
    ):
        self._lists, self._seconds, self._latency, self._buffered = lists, seconds, latency, buffered
        self._stages = len(lists)
        self._chunks = 1 + max((action.chunk for actions in lists for action in actions), default=0)
        self._clock = [0.0] * self._stages
        self._next = [0] * self._stages
        self._done: list[set[Action]] = [set() for _ in lists]
        self._arrived: list[dict[Action, float]] = [{} for _ in lists]  # by receive: when its tensor is there
        self._lines: dict[tuple[int, int, str], _Line] = {}  # (from, to, kind)
        self._events: list[Event] = []

    def run(self) -> Timeline:
        moved = True
        while moved:
            moved = False
            for stage, actions in enumerate(self._lists):
                while self._next[stage] < len(actions) and self._step(stage):
                    moved = True
        waiting = {s: actions[self._next[s]] for s, actions in enumerate(self._lists) if self._next[s] < len(actions)}
        if waiting:
            raise StandsStill(waiting)
        for line in self._lines.values():
            if len(line.sent) != len(line.received):
                raise ScheduleError(f"{line.sent} was sent and {line.received} received")
        computed = [event for event in self._events if event.action.op in COMPUTE]
        busy = [0.0] * self._stages
        for event in computed:
            busy[event.stage] += event.end - event.start
        makespan = max((event.end for event in computed), default=0.0)
        return Timeline(tuple(sorted(self._events, key=attrgetter("start"))), makespan, tuple(busy))

    def _step(self, stage: int) -> bool:
        """Run the next action of a stage; False where it has to wait."""
        action = self._lists[stage][self._next[stage]]
        if action in self._done[stage]:
            raise ScheduleError(f"stage {stage} does {action} twice")
        if action.op in COMPUTE:
            return self._compute(stage, action)
        other, match = other_end(stage, self._stages, action)
        if match.chunk not in range(self._chunks):
            raise ScheduleError(f"stage {stage}: {action} has no other end")
        if action.op in SENDS:
            return self._send(stage, action, other, match)
        return self._receive(stage, action, other, match)

    def _ended(self, stage: int, action: Action) -> None:
        self._done[stage].add(action)
        self._next[stage] += 1

    def _compute(self, stage: int, action: Action) -> bool:
        done = self._done[stage]
        if action.op != FORWARD and Action(FORWARD, action.microbatch, action.chunk) not in done:
            raise ScheduleError(f"stage {stage}: {action} before its forward")
        if action.op == RECOMPUTE and Action(BACKWARD, action.microbatch, action.chunk) in done:
            raise ScheduleError(f"stage {stage}: {action} after its backward")
        start = self._clock[stage]
        needed = input_of(stage, self._stages, self._chunks, action)
        if needed is not None:
            if needed not in done:
                raise ScheduleError(f"stage {stage}: {action} without {needed.op}")
            if needed not in self._arrived[stage]:
                return False
            start = max(start, self._arrived[stage].pop(needed))
        self._clock[stage] = start + self._seconds(stage, action)
        self._events.append(Event(stage, action, start, self._clock[stage]))
        self._ended(stage, action)
        return True

    def _send(self, stage: int, action: Action, other: int, receive: Action) -> bool:
        source = FORWARD if action.op == SEND_FORWARD else BACKWARD
        if Action(source, action.microbatch, action.chunk) not in self._done[stage]:
            raise ScheduleError(f"stage {stage}: {action} before its {source}")
        if not self._buffered:
            return False  # until the receive takes it
        self._deliver(stage, action, other, receive, self._clock[stage])
        self._ended(stage, action)
        return True

    def _receive(self, stage: int, action: Action, other: int, send: Action) -> bool:
        if self._buffered:  # only says that the tensor is wanted: the compute that reads it waits for it
            self._line(other, stage, action).receive(action)
            self._ended(stage, action)
            return True
        offered = self._lists[other][self._next[other]] if self._next[other] < len(self._lists[other]) else None
        if offered is None or offered.op != send.op or other_end(other, self._stages, offered)[0] != stage:
            return False
        if not self._sendable(other, offered):
            return False
        start = max(self._clock[stage], self._clock[other])
        self._deliver(other, offered, stage, other_end(other, self._stages, offered)[1], start)
        self._line(other, stage, action).receive(action)
        self._clock[stage] = self._arrived[stage][action]
        self._clock[other] = self._clock[stage] - self._latency
        self._ended(other, offered)
        self._ended(stage, action)
        return True

    def _sendable(self, stage: int, send: Action) -> bool:
        source = FORWARD if send.op == SEND_FORWARD else BACKWARD
        return Action(source, send.microbatch, send.chunk) in self._done[stage]

    def _deliver(self, stage: int, send: Action, other: int, receive: Action, now: float) -> None:
        line = self._line(stage, other, receive)
        line.send(receive)
        start = max(now, line.free)
        line.free = start + self._seconds(stage, send)
        self._arrived[other][receive] = line.free + self._latency
        self._events.append(Event(stage, send, start, line.free + self._latency))

    def _line(self, source: int, to: int, receive: Action) -> _Line:
        key = (source, to, receive.op)
        if key not in self._lines:
            self._lines[key] = _Line()
        return self._lines[key]


class _Line:
    """Messages of one kind from one stage to another: they are received in the order in which they are sent."""

    def __init__(self) -> None:
        self.sent: list[Action] = []  # as the receives that they are meant for
        self.received: list[Action] = []
        self.free = 0.0  # when the next may start

    def send(self, message: Action) -> None:
        self.sent.append(message)
        self._check(len(self.sent) - 1)

    def receive(self, message: Action) -> None:
        self.received.append(message)
        self._check(len(self.received) - 1)

    def _check(self, index: int) -> None:
        if index < min(len(self.sent), len(self.received)) and self.sent[index] != self.received[index]:
            raise ScheduleError(f"{self.received[index]} meets what was sent as {self.sent[index]}")
