"""What each slot of a cache holds, for prompts that begin with it."""

from __future__ import annotations

from collections.abc import Sequence

from megalora.generation.requests import Owner, Prompt
from megalora.generation.sequences import Ongoing, common_start


class Held:
    """The owner (Prompt.owner) and the tokens of each of `slots` slots: no more and no less than its state has read.

    recurrent  whether a slot holds a state, which goes on behind all that it has read and nowhere else
    """

    def __init__(self, slots: int, recurrent: bool):
        self._recurrent = recurrent
        self._slots: list[tuple[Owner, list[int]]] = [((0, None), []) for _ in range(slots)]

    def forget(self, adapter: int | None = None) -> None:
        """Let no prompt go on from what the slots hold, or from what those of one adapter do."""
        self._slots = [(owner, [] if adapter in (None, owner[0]) else held) for owner, held in self._slots]

    def seat(self, slot: int, prompt: Prompt) -> None:
        """Note that the slot holds all of a prompt."""
        self._slots[slot] = prompt.owner, list(prompt.token_ids)

    def cut(self, slot: int, kept: int) -> None:
        """Note that it holds so many tokens of that alone."""
        del self._slots[slot][1][kept:]

    def read(self, fed: Sequence[Ongoing], tokens: Sequence[int]) -> None:
        """Note that the slots of these sequences have read a token each; -1: one that no prompt has."""
        for sequence, token in zip(fed, tokens, strict=True):
            self._slots[sequence.slot][1].append(token)

    def best(self, prompt: Prompt, slots: Sequence[int], least: int) -> tuple[int, int] | None:
        """Return (which of these slots holds most of the prompt, how many tokens); None: none has `least` or more."""
        length = len(prompt.token_ids)
        mine = [slot for slot in slots if self._slots[slot][0] == prompt.owner]
        common = {slot: common_start(self._slots[slot][1], prompt.token_ids) for slot in mine}
        if self._recurrent:
            common = {slot: n for slot, n in common.items() if n == len(self._slots[slot][1]) < length}
        # The last token of the prompt is fed in any case: the reply starts from it.
        found = [(min(n, length - 1), slot) for slot, n in common.items()]
        kept, best = max(found, key=lambda pair: pair[0], default=(0, 0))
        return (best, kept) if kept >= max(1, least) else None
