"""Requests under way in a replica, and those that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from megalora.generation.cache import Span
from megalora.generation.requests import Prompt, Reply, Request
from megalora.generation.sampling import Logprobs, Sampling, draw


@dataclass
class Ongoing:
    """A request under way. kept: its tokens in the cache; room: longest reply; parts: hidden states of its prompt."""

    request: Request
    slot: int
    room: int
    kept: int
    reply: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: Logprobs | None = None  # of the newest token
    parts: list[torch.Tensor] = field(default_factory=list)

    @property
    def prompt(self) -> Prompt:
        return self.request.prompt

    @property
    def said(self) -> Reply:
        """The reply so far."""
        return Reply(tuple(self.reply), self.finish_reason)

    def draw(self, ahead: int = 0) -> float:
        """Return the random number of its next token, or of that `ahead` places behind it."""
        prompt = self.prompt
        stream = prompt.number if prompt.stream is None else prompt.stream
        return draw(self.request.sampling.seed, stream, len(self.reply) + ahead)

    def part(self, most: int) -> Span:
        """Return the part of its prompt that is fed next: at most so many tokens, but a source with all behind it."""
        length = len(self.prompt.token_ids)
        return Span(self.slot, self.kept, length if self.prompt.source else min(length, self.kept + most))


@dataclass
class Queue:
    """What there is to do.

    free      slots of the cache
    waiting   requests without a slot
    entering  sequences whose prompts are not in the cache, those of one step together
    running   sequences whose prompts are
    turn      whether it is the running sequences' turn: a part of a prompt was fed before
    """

    free: list[int]
    waiting: deque[Request] = field(default_factory=deque)
    entering: deque[list[Ongoing]] = field(default_factory=deque)
    running: list[Ongoing] = field(default_factory=list)
    turn: bool = False

    @property
    def rests(self) -> bool:
        return not (self.waiting or self.entering or self.running)

    @property
    def unfed(self) -> list[Ongoing]:
        """Those that enter."""
        return [sequence for group in self.entering for sequence in group]

    def remove_ended(self) -> list[Ongoing]:
        """Take the sequences out that have ended, and return them: their slots are free."""
        ended = [sequence for sequence in (*self.unfed, *self.running) if sequence.finish_reason is not None]
        if ended:
            groups = ([one for one in group if one.finish_reason is None] for group in self.entering)
            self.entering = deque(group for group in groups if group)
            self.running = [sequence for sequence in self.running if sequence.finish_reason is None]
            self.free += [sequence.slot for sequence in ended]
        return ended


def by_sampling(fed: Sequence[Ongoing]) -> dict[Sampling, list[int]]:
    """Return the rows of the sequences that are sampled alike, but for their seeds."""
    rows: dict[Sampling, list[int]] = {}
    for row, sequence in enumerate(fed):
        rows.setdefault(replace(sequence.request.sampling, seed=0), []).append(row)
    return rows


def common_start(held: Sequence[int], token_ids: Sequence[int]) -> int:
    """Return tokens that both begin with."""
    for i, (a, b) in enumerate(zip(held, token_ids, strict=False)):
        if a != b:
            return i
    return min(len(held), len(token_ids))
