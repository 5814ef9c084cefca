"""Where replies to --prompt and --prompts_file go: standard output, or a file of JSON lines. Rank 0 alone writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from megalora.errors import UserError
from megalora.generation.prompts import Question
from megalora.generation.requests import Prompt, Reply
from megalora.generation.terminal import Voice, side_by_side, written
from megalora.generation.text import Answer, Piece, Reader


class Output:
    """Answers in the order of their questions, each as soon as it and all before it are there.

    A file is written aside and takes its name when all of them are in it. Raises UserError where it cannot be written:
    as far as that can be told, before there is anything to write.

    names     what the answers to one question are called, such as ("tuned", "base"); the first is the response
    streamed  one question and answer, shown on standard output as it comes
    """

    def __init__(
        self,
        questions: Sequence[Question],
        output_file: str | None,
        *,
        names: Sequence[str],
        names_prompts: bool,
        show_thinking: bool,
        streamed: bool = False,
    ):
        self._questions, self._names = questions, tuple(names)
        self._names_prompts, self._show_thinking = names_prompts, show_thinking
        self._voice = Voice(sys.stdout, show_thinking) if streamed else None
        self._ready: dict[int, dict[str, Answer]] = {}
        self._written = 0
        self._path = None if output_file is None else Path(output_file)
        self._file: TextIO | None = None
        if self._path is not None:
            with self._told():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if self._path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "it is a folder")
                if not os.access(self._path.parent, os.W_OK):
                    raise PermissionError(errno.EACCES, "its folder is read-only")

    def show(self, pieces: Sequence[Piece]) -> None:
        """Show some text of the answer, where it is streamed."""
        self._voice.say(pieces)

    def keep(self, name: str, reader: Reader) -> Callable[[Prompt, Reply], None]:
        """Return a function that adds the answer `name` to a prompt, which is numbered as its question."""
        return lambda prompt, reply: self.add(prompt.number, name, reader.answer(reply, prompt))

    def add(self, number: int, name: str, answer: Answer) -> None:
        """Add the answer `name` to question `number`; given again, it stays as it was."""
        if number >= self._written:
            self._ready.setdefault(number, {})[name] = answer
        while len(self._ready.get(self._written, ())) == len(self._names):
            self._write(self._questions[self._written], self._ready.pop(self._written))
            self._written += 1

    def finish(self) -> None:
        assert self._written == len(self._questions), (self._written, len(self._questions))
        if self._file is not None:
            with self._told():
                self._file.close()
                self._aside.replace(self._path)

    def _write(self, question: Question, answers: dict[str, Answer]) -> None:
        self._say(question, answers)
        remarks = dict.fromkeys(answer.remark for answer in answers.values() if answer.remark)
        which = f"{question.where}: " if self._names_prompts else ""
        for remark in remarks if not self._show_thinking else ():
            print(f"megalora: {which}{remark}", file=sys.stderr, flush=True)

    def _say(self, question: Question, answers: dict[str, Answer]) -> None:
        if self._voice is not None:
            self._voice.end()
            return
        if self._path is None:
            texts = [written(answers[name], self._show_thinking) for name in self._names]
            shown = texts[0]
            if len(texts) > 1:
                shown = side_by_side(self._names, texts, _terminal_width())
            asked = " ".join(filter(None, (question.image, question.text)))
            print(f"> {asked}\n{shown}\n" if self._names_prompts else shown, flush=True)
            return
        row: dict[str, str | None] = {**question.told}
        for name in self._names:
            row |= self._fields("" if name == self._names[0] else f"{name}_", answers[name])
        with self._told():
            if self._file is None:
                self._file = self._aside.open("w", encoding="utf-8")
            print(json.dumps(row, ensure_ascii=False), file=self._file, flush=True)
        if sys.stderr.isatty():
            end = "\n" if self._written + 1 == len(self._questions) else ""
            print(f"\r{self._written + 1} of {len(self._questions)} replies", end=end, file=sys.stderr, flush=True)

    def _fields(self, prefix: str, answer: Answer) -> dict[str, str | None]:
        fields = {f"{prefix}response": answer.text, f"{prefix}finish_reason": answer.finish_reason}
        return fields | ({f"{prefix}thinking": answer.thinking} if self._show_thinking else {})

    @property
    def _aside(self) -> Path:
        return self._path.with_name(self._path.name + ".partial")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"output_file {self._path}: cannot be written ({error.strerror})", "free space or name another file"
            ) from None


def _terminal_width() -> int:
    """Return columns of the terminal that standard output is, else 0."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
