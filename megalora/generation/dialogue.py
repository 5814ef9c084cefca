"""A dialogue at the terminal: rank 0 reads lines and prints replies, all ranks of the mesh make them."""

from __future__ import annotations

import itertools
import os
import select
import sys
from collections.abc import Callable, Sequence

from megalora.data import ChatTemplate
from megalora.data.formats import Message
from megalora.errors import UserError
from megalora.generation.prompts import Question, ask, decode, encode
from megalora.generation.replica import Prompt, Reply
from megalora.parallel.collectives import broadcast_object
from megalora.parallel.mesh import Axis

KEEP_ALIVE = 60.0  # seconds: ranks that waited for a person longer than a collective's timeout would end the program
NOTHING_YET: Sequence[int] = ()


def dialogue(world: Axis, chat: Chat | None, reply: Callable[[Prompt], Reply]) -> None:
    """Turn by turn until the input ends. Collective over `world`; chat is rank 0's, None elsewhere.

    reply  gives the reply to a prompt on every rank; collective
    """
    for turn in itertools.count():
        token_ids = NOTHING_YET
        while token_ids is not None and not token_ids:
            token_ids = broadcast_object(chat.listen(KEEP_ALIVE) if chat is not None else None, world)
        if token_ids is None:
            return
        answer = reply(Prompt(turn, token_ids))
        if chat is not None:
            chat.answer(answer)


class Chat:
    """Rank 0's side: the terminal, and what was said.

    context      longest prompt and reply together, in tokens
    descriptor   of the input; lines are read from it directly, so that waiting for one can be left off
    """

    def __init__(self, template: ChatTemplate, system: str | None, context: int, descriptor: int):
        self._template, self._system, self._context = template, system, context
        self._descriptor, self._unread, self._ended = descriptor, b"", False
        self._history: tuple[Message, ...] = ()
        self._shows_mark = os.isatty(descriptor)
        if self._shows_mark:
            print("Write a message; Ctrl-D ends.", file=sys.stderr, flush=True)
        self._mark()

    def listen(self, patience: float) -> Sequence[int] | None:
        """The tokens that the next reply starts from; NOTHING_YET after `patience` seconds; None at the end.

        A message that cannot be replied to is told on one line, and NOTHING_YET too.
        """
        line = self._line(patience)
        if line is None:
            return None
        if not line.strip():
            return NOTHING_YET
        try:
            return self._hear(line.decode("utf-8").strip())
        except UnicodeDecodeError:
            self._complain("the message is not UTF-8: set the terminal to UTF-8")
        except UserError as error:
            self._complain(f"{error}; the dialogue starts anew")
            self._history = ()
        return NOTHING_YET

    def answer(self, reply: Reply) -> None:
        """Prints the reply and keeps it."""
        text = decode(self._template, reply.token_ids)
        self._history = (*self._history, {"role": "assistant", "content": text})
        print(text + (" ..." if reply.finish_reason == "length" else ""), flush=True)
        self._mark()

    def _hear(self, text: str) -> list[int]:
        said = ask(text, self._system, "the message").messages
        messages = (*self._history, said[-1]) if self._history else said
        token_ids = encode(self._template, Question(messages, "the dialogue"), self._context)
        self._history = messages
        return token_ids

    def _line(self, patience: float) -> bytes | None:
        """The next line, without its end; b"" if it is not there after `patience` seconds; None at the end."""
        while b"\n" not in self._unread and not self._ended:
            if not select.select([self._descriptor], [], [], patience)[0]:
                return b""
            data = os.read(self._descriptor, 1 << 16)
            self._unread += data
            self._ended = not data
        if not self._unread:
            return None
        line, _, self._unread = self._unread.partition(b"\n")
        if not line.strip():
            self._mark()
        return line

    def _complain(self, message: str) -> None:
        print(f"megalora: {message}", file=sys.stderr, flush=True)
        self._mark()

    def _mark(self) -> None:
        if self._shows_mark:
            print("> ", end="", flush=True)
