"""What a replica is asked and what it replies, as tokens; and who asks and listens, on its first rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megalora.generation.sampling import Logprobs, Sampling
from megalora.pictures import Picture

Owner = tuple[int, str | None]  # Prompt.owner
STOP, LENGTH, INTERRUPTED, FAILED = "stop", "length", "interrupted", "failed"


@dataclass(frozen=True)
class Prompt:
    """A prompt of at least one token.

    number   of the prompt in the run; no two that run at a time have the same
    adapter  who replies, where the stage shares several adapters: 0 the base, 1 the first adapter, ...
    source   of an encoder-decoder: what the encoder reads; token_ids are what the decoder begins with
    picture  an image, whose tokens are the first of the source, or where there is none of token_ids
    stream   number that the random numbers of its reply come from, beside the seed; None: `number`
    """

    number: int
    token_ids: Sequence[int]
    adapter: int = 0
    stream: int | None = None
    source: Sequence[int] = ()
    picture: Picture | None = None

    @property
    def owner(self) -> Owner:
        """Whose keys and values its tokens have: those of an adapter, behind an image (its digest) where it has one."""
        return self.adapter, None if self.picture is None else self.picture.digest

    @property
    def fed(self) -> int:
        """Tokens that are fed before the reply."""
        return len(self.token_ids) + len(self.source)


@dataclass(frozen=True)
class Request:
    """A prompt, and how to reply to it.

    max_new_tokens  longest reply; where prompt and reply together would be longer than the context, that ends it first
    stop_token_ids  each of them ends the reply
    logprobs        tell the log-probability of each token, and of this many likeliest ones beside it; None: of none
    """

    prompt: Prompt
    sampling: Sampling
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    logprobs: int | None = None


@dataclass(frozen=True)
class Reply:
    """token_ids without the one that stopped it.

    finish_reason  why it ends: STOP, LENGTH, INTERRUPTED, or FAILED where the logits are not finite
    """

    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class Change:
    """Adapter `number` is another one from the next step on. tensors: its own, by parameter name."""

    number: int
    tensors: Mapping[str, torch.Tensor]


class Listener(Protocol):
    """Hears the replies while they are made."""

    def hear(self, prompt: Prompt, token_id: int, logprobs: Logprobs | None) -> str | None:
        """Return the next token of the reply to a prompt. Returns STOP or INTERRUPTED to end the reply with it."""
        ...

    def left(self, prompt: Prompt) -> bool:
        """Return whether nobody waits for the reply to a prompt any more: asked while the prompt is being fed."""
        ...

    def done(self, prompt: Prompt, reply: Reply) -> None:
        """Note that the reply is whole."""
        ...


class Inbox(Protocol):
    """Requests from outside, on the first rank. Other threads may put some in."""

    def wait(self, seconds: float) -> Sequence[Request] | None:
        """Return some requests, or none after `seconds` or where a change waits; None: no more will come."""
        ...

    def waiting(self) -> bool:
        """Return whether `take` has something to give."""
        ...

    def take(self, count: int) -> Sequence[Request]:
        """Return at most `count` requests, at once."""
        ...

    def changing(self) -> bool:
        """Return whether `change` has something to give."""
        ...

    def change(self) -> Change | None:
        """Return what is to be changed before the next step."""
        ...

    def changed(self) -> None:
        """Note that the last change that was given is made, on every rank."""
        ...
