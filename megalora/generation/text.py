"""From the tokens of a reply to its text, while they come or at once: whole characters, up to a stop string, and the
thinking (`<think> ... </think>`) apart from the answer.

Text that may yet turn out to be part of a character, of a stop string or of a tag is held back until that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megalora.generation.prompts import decode, unseen_stops
from megalora.generation.requests import INTERRUPTED, STOP, Prompt, Reply
from megalora.generation.sampling import Logprobs

Decode = Callable[[Sequence[int]], str]
THINK, END_OF_THINKING = "<think>", "</think>"
UNFINISHED = "\ufffd"  # what decoding gives for bytes that are no whole character


@dataclass(frozen=True)
class Piece:
    """Some text of a reply, of its thinking or of its answer."""

    text: str
    thinking: bool


@dataclass(frozen=True)
class Answer:
    """A whole reply as text.

    thinking    None where it has none
    whole       both, as the model wrote them
    unfinished  it ends in the thinking
    """

    text: str
    thinking: str | None
    whole: str
    finish_reason: str
    unfinished: bool = False

    @property
    def closed(self) -> str:
        """As `whole`, but with an end to the thinking: in a dialogue that goes on, templates leave thinking out."""
        return f"{self.whole.rstrip()}\n{END_OF_THINKING}\n\n" if self.unfinished else self.whole

    @property
    def remark(self) -> str | None:
        """What whoever sees no thinking should be told."""
        if not self.unfinished:
            return None
        return "the reply ends in its thinking: --show_thinking true shows it, a larger --max_new_tokens lets it end"


class Characters:
    """Text of tokens that come one at a time; a character that several tokens make comes with the last of them."""

    def __init__(self, decode: Decode):
        self._decode = decode
        self._ids: list[int] = []
        self._before, self._given = 0, 0  # text is given of the tokens [: given]; those from `before` are its context

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self.rest()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._before, self._given = self._given, len(self._ids)
        return text

    def rest(self) -> str:
        """Return what is held back once the reply has ended."""
        # Decoders look at a token's neighbours (a space before a word): a few tokens before the new ones are enough.
        known, text = self._decode(self._ids[self._before : self._given]), self._decode(self._ids[self._before :])
        if text.startswith(known):
            return text[len(known) :]
        return self._decode(self._ids[self._given :])  # sentencepiece: bytes of no character spoil those before them


class Until:
    """Text up to where the first of some `stops` begins."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.stopped = tuple(stops), "", False

    def add(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, safe = True, min(found)
        else:
            safe = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        given, self._held = self._held[:safe], self._held[safe:]
        return given

    def rest(self) -> str:
        return "" if self.stopped else self._held


class Thinking:
    """Tells thinking from answer.

    inside  the prompt ends with <think>, so the reply begins in the thinking; None: all is answer, tags and all
    Only a tag at the very beginning opens it. White space beside the tags belongs to neither.
    """

    def __init__(self, inside: bool | None):
        self._state = "plain" if inside is None else "thinking" if inside else "start"
        self._held, self._bare = "", inside is not None  # bare: nothing but white space since the last tag

    def add(self, text: str) -> list[Piece]:
        self._held += text
        pieces = []
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(THINK):
                self._state, self._held = "thinking", begun.removeprefix(THINK)
            elif not THINK.startswith(begun):
                self._state, self._bare = "plain", False
        if self._state == "thinking":
            before, tag, after = self._held.partition(END_OF_THINKING)
            if tag:
                pieces += self._given(before.rstrip(), True)
                self._state, self._held, self._bare = "answer", after, True
            else:
                # White space may stand before the tag, and then it goes too.
                safe = len(before[: len(before) - _overlap(before, END_OF_THINKING)].rstrip())
                pieces += self._given(before[:safe], True)
                self._held = before[safe:]
        if self._state in ("answer", "plain"):
            pieces += self._given(self._held, False)
            self._held = ""
        return pieces

    @property
    def inside(self) -> bool:
        """Whether what has come so far ends in the thinking."""
        return self._state == "thinking"

    def rest(self) -> list[Piece]:
        if self._state == "start":  # no tag has come, so that the white space is the answer's
            self._bare = False
        return self._given(self._held.rstrip() if self._state == "thinking" else self._held, self._state == "thinking")

    def _given(self, text: str, thinking: bool) -> list[Piece]:
        if self._bare:
            text = text.lstrip()
            self._bare = not text
        return [Piece(text, thinking)] if text else []


class Reader:
    """Reads replies by a model's tokenizer.

    stops  texts that end a reply
    shown  special tokens that are a part of the text, as the tags of thinking are
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), shown: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        tags = unseen_stops(tokenizer, (THINK, END_OF_THINKING, *shown))
        self._tags = {token_id: tokenizer.decode([token_id]) for token_id in tags}

    def answer(self, reply: Reply, prompt: Prompt) -> Answer:
        """Return a whole reply to `prompt`."""
        until = Until(self._stops)
        whole = until.add(self._text(reply.token_ids)) + until.rest()
        thinking = self._thinking(prompt)
        pieces = [*thinking.add(whole), *thinking.rest()]
        thought = "".join(piece.text for piece in pieces if piece.thinking)
        said = "".join(piece.text for piece in pieces if not piece.thinking)
        return Answer(said, thought or None, whole, reply.finish_reason, thinking.inside)

    def follow(self, prompt: Prompt, stops: Sequence[str] | None = None, *, thinking: bool = True) -> Following:
        """Read the reply to `prompt` while it comes.

        stops     in place of the reader's own; thinking: tell it from the answer
        """
        until = Until(self._stops if stops is None else stops)
        return Following(Characters(self._decode), until, self._thinking(prompt) if thinking else Thinking(None))

    def _text(self, token_ids: Sequence[int]) -> str:
        """Return the text of a whole reply."""
        text = self._decode(token_ids)
        if UNFINISHED not in text:
            return text
        characters = Characters(self._decode)
        return "".join([*map(characters.add, token_ids), characters.rest()])

    def _decode(self, token_ids: Sequence[int]) -> str:
        if not self._tags:
            return decode(self._tokenizer, token_ids)
        said, between = "", list[int]()
        for token in token_ids:
            if token in self._tags:
                said += decode(self._tokenizer, between) + self._tags[token]
                between = []
            else:
                between.append(token)
        return said + decode(self._tokenizer, between)

    def _thinking(self, prompt: Prompt) -> Thinking:
        end = self._tokenizer.decode(list(prompt.token_ids[-8:]))  # some templates begin the thinking themselves
        return Thinking(end.rstrip().endswith(THINK))


@dataclass(frozen=True)
class Following:
    """One reply under way: token by token to pieces of text."""

    characters: Characters
    until: Until
    thinking: Thinking

    def add(self, token_id: int) -> list[Piece]:
        return self.thinking.add(self.until.add(self.characters.add(token_id)))

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.until.stopped

    def rest(self) -> list[Piece]:
        """Return what is held back: the reply has ended."""
        text = self.until.add(self.characters.rest())
        return [*self.thinking.add(text + self.until.rest()), *self.thinking.rest()]


class Ear:
    """A megalora.generation.replica.Listener that reads along: it ends replies at stop strings, or when told to.

    show         is given the pieces of the replies as they come
    interrupted  whether to leave off
    finished     is given each prompt and its whole reply
    """

    def __init__(
        self,
        reader: Reader,
        *,
        show: Callable[[Sequence[Piece]], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        finished: Callable[[Prompt, Reply], None] | None = None,
    ):
        self._reader, self._show, self._interrupted, self._finished = reader, show, interrupted, finished
        self._following: dict[int, Following] = {}

    def hear(self, prompt: Prompt, token_id: int, logprobs: Logprobs | None = None) -> str | None:
        if prompt.number not in self._following:
            self._following[prompt.number] = self._reader.follow(prompt)
        following = self._following[prompt.number]
        pieces = following.add(token_id)
        if self._show is not None:
            self._show(pieces)
        if following.stopped:
            return STOP
        return INTERRUPTED if self.left(prompt) else None

    def left(self, prompt: Prompt) -> bool:
        return self._interrupted is not None and self._interrupted()

    def done(self, prompt: Prompt, reply: Reply) -> None:
        following = self._following.pop(prompt.number, None)
        if self._show is not None and following is not None:
            self._show(following.rest())
        if self._finished is not None:
            self._finished(prompt, reply)


def _overlap(text: str, stop: str) -> int:
    """Return length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
