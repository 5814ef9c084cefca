"""A dialogue at the terminal: rank 0 reads lines and prints replies as they come, all ranks of the mesh make them."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megalora.cluster.handlers import tell
from megalora.data import ChatTemplate, Conversation, Message
from megalora.errors import UserError
from megalora.generation.prompts import Question, ask, encode
from megalora.generation.requests import Prompt, Reply
from megalora.generation.terminal import Voice
from megalora.generation.text import Piece, Reader
from megalora.parallel.collectives import broadcast_object
from megalora.parallel.mesh import Axis

KEEP_ALIVE = 60.0  # seconds: ranks that waited for a person longer than a collective's timeout would end the program
COMMANDS = {
    "/reset": "forget what was said",
    "/base": "the base model replies",
    "/tuned": "the adapted model replies",
    "/help": "these commands",
    "/quit": "end (so does Ctrl-D)",
}
HINT = "Write a message; /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends."
NAMES = {True: "tuned", False: "base"}


@dataclass(frozen=True)
class Turn:
    """What the next replies start from. adapted: who replies, one after another: True the adapted model, False the
    base."""

    token_ids: Sequence[int]
    adapted: tuple[bool, ...]


@dataclass(frozen=True)
class NothingYet:
    """The person has said nothing that asks for a reply; the ranks go on waiting."""


def dialogue(world: Axis, chat: Chat | None, reply: Callable[[Prompt, bool], Reply]) -> None:
    """Turn by turn until the input ends. Collective over `world`; chat is rank 0's, None elsewhere.

    reply  gives the reply to a prompt of the adapted model (True) or the base, on every rank; collective
    """
    with chat.attention() if chat is not None else _deaf():
        for number in itertools.count():
            turn: Turn | NothingYet | None = NothingYet()
            while isinstance(turn, NothingYet):
                turn = broadcast_object(chat.listen(KEEP_ALIVE) if chat is not None else None, world)
            if turn is None:
                return
            prompt = Prompt(number, turn.token_ids)
            for adapted in turn.adapted:
                if chat is not None:
                    chat.begin(turn, adapted)
                answer = reply(prompt, adapted)
                if chat is not None:
                    chat.end(answer, adapted)


class Chat:
    """Rank 0's side: the terminal, and what was said.

    context      longest prompt and reply together, in tokens
    descriptor   of the input; lines are read from it directly, so that waiting for one can be left off
    edited       read lines by readline, which edits and recalls them and takes pasted lines as one, and which cannot
                 leave off waiting
    repliers     who replies, as Turn.adapted; where the adapted model is among them the person may choose
    """

    def __init__(
        self,
        template: ChatTemplate,
        reader: Reader,
        voice: Voice,
        system: str | None,
        context: int,
        descriptor: int,
        repliers: tuple[bool, ...],
        edited: bool = False,
    ):
        self._template, self._reader, self._voice = template, reader, voice
        self._system, self._context = system, context
        self._repliers, self._has_adapter = repliers, True in repliers
        self._descriptor, self._unread, self._ended = descriptor, b"", False
        self._history: tuple[Message, ...] = ()
        self._shows_mark, self._edited = os.isatty(descriptor) and not edited, edited
        self._at_terminal = os.isatty(descriptor)
        self._replying = self._interrupted = False
        self._turn: Turn | None = None

    # ---- the person ----

    @contextlib.contextmanager
    def attention(self) -> Iterator[None]:
        """Let Ctrl-C stop a reply while inside, and not end the program."""
        with _on_interrupt(self._interrupt if self._at_terminal else None):
            if self._at_terminal:
                print(HINT, file=sys.stderr, flush=True)
            self._mark()
            yield

    def _interrupt(self, signum: int, frame: object) -> None:
        if not self._replying and self._edited:
            raise KeyboardInterrupt  # out of readline, which forgets the line
        if not self._replying:
            tell(f"\n{HINT}")
            if self._shows_mark:
                os.write(1, b"> ")  # print() may be what this interrupts
        elif self._interrupted:  # asked for twice: the reply does not come to where it can be left off
            raise KeyboardInterrupt
        self._interrupted = True

    def listen(self, patience: float) -> Turn | NothingYet | None:
        """Return what the next reply starts from; NothingYet after `patience` seconds; None at the end.

        A message that cannot be replied to is told on one line, and NothingYet too.
        """
        line = self._line(patience)
        if line is None:
            return None
        if not line.strip():
            return NothingYet()
        try:
            text = line.decode("utf-8").strip()
            if text == "/quit":
                return None
            if text.startswith("/") and text[1:].isalpha():
                return self._obey(text)
            return self._hear(text)
        except UnicodeDecodeError:
            self._tell("megalora: the message is not UTF-8: set the terminal to UTF-8")
        except UserError as error:
            self._tell(f"megalora: {error}; the dialogue starts anew")
            self._history = ()
        return NothingYet()

    def _obey(self, command: str) -> NothingYet:
        if command == "/reset":
            self._history = ()
            self._tell("The dialogue starts anew.")
        elif command in ("/base", "/tuned") and not self._has_adapter:
            self._tell("megalora: there is no adapter, the base replies: start with --resume_peft_from_checkpoint")
        elif command in ("/base", "/tuned"):
            self._repliers = (command == "/tuned",)
            self._tell(f"From now on {COMMANDS[command]}.")
        elif command == "/help":
            self._tell("\n".join(f"{name:8s}{what}" for name, what in COMMANDS.items()))
        else:
            self._tell(f"megalora: unknown command {command}: the commands are {' '.join(COMMANDS)}")
        return NothingYet()

    def _hear(self, text: str) -> Turn:
        said = ask(text, self._system, "the message").conversation.messages
        messages = (*self._history, said[-1]) if self._history else said
        token_ids = encode(self._template, Question(Conversation(messages), "the dialogue"), self._context)
        if self._template.special_in_text(Conversation((said[-1],))):
            print("megalora: special tokens in the message are tokenised as text", file=sys.stderr, flush=True)
        self._history = messages
        return Turn(token_ids, self._repliers)

    def _line(self, patience: float) -> bytes | None:
        """Return the next line, without its end; b"" if it is not there after `patience` seconds; None at the end.

        Where lines are edited, one may be several that were pasted.
        """
        if self._edited:
            return self._edited_line()
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

    def _edited_line(self) -> bytes | None:
        try:
            return input("> ").encode("utf-8", "surrogateescape")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(f"\n{HINT}", file=sys.stderr, flush=True)
            return b""

    # ---- the replies ----

    def begin(self, turn: Turn, adapted: bool) -> None:
        """Note that a reply is about to come."""
        self._turn, self._replying, self._interrupted = turn, True, False
        if len(turn.adapted) > 1:
            print(f"{NAMES[adapted]}: ", end="", flush=True)

    def show(self, pieces: Sequence[Piece]) -> None:
        """Show some text of the reply that has come."""
        self._voice.say(pieces)

    def interrupted(self) -> bool:
        """Return whether the person wants no more of this reply."""
        return self._interrupted

    def end(self, reply: Reply, adapted: bool) -> None:
        """Note that the reply is whole. Of several to one message the dialogue goes on from the first."""
        self._replying = False
        self._voice.end(reply.finish_reason)
        if adapted == self._turn.adapted[0]:
            answer = self._reader.answer(reply, Prompt(0, self._turn.token_ids))
            self._history = (*self._history, Message("assistant", answer.closed))
            if answer.remark and not self._voice.shows_thinking:
                print(f"megalora: {answer.remark}", file=sys.stderr, flush=True)
        if adapted == self._turn.adapted[-1]:
            self._mark()

    def _tell(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
        self._mark()

    def _mark(self) -> None:
        if self._shows_mark:
            print("> ", end="", flush=True)


def edits_lines(world: Axis) -> bool:
    """Return whether lines are typed at a terminal where readline can be had.

    On several ranks it is not used: they wait for one another, and readline cannot leave off waiting.
    """
    if world.size > 1 or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        import readline  # noqa: F401  # from its import on input() edits lines
    except ImportError:  # Python can be built without it
        return False
    return True


def _deaf() -> contextlib.AbstractContextManager:
    """Leave Ctrl-C, on ranks without the terminal, to the one that has it."""
    return _on_interrupt(signal.SIG_IGN)


@contextlib.contextmanager
def _on_interrupt(handler: Any) -> Iterator[None]:
    """Send SIGINT to `handler` (None: to whom it goes now) while inside."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
