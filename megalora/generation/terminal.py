"""What the user sees of replies at a terminal: text as it comes, thinking apart, two replies side by side."""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from megalora.generation.requests import INTERRUPTED, LENGTH
from megalora.generation.text import END_OF_THINKING, THINK, Answer, Piece

DIM, PLAIN = "\033[2m", "\033[0m"
ENDINGS = {LENGTH: " ...", INTERRUPTED: " [stopped]"}  # of replies that are not whole
NARROWEST = 30  # columns of text; with less room two replies stand one below the other


class Voice:
    """Writes one reply after another to a stream, piece by piece."""

    def __init__(self, out: TextIO, show_thinking: bool):
        self._out, self._show_thinking = out, show_thinking
        self._dim, self._plain = (DIM, PLAIN) if out.isatty() else ("", "")
        self._thinks = False

    @property
    def shows_thinking(self) -> bool:
        return self._show_thinking

    def say(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.thinking != self._thinks:
                self._turn(piece.thinking)
            if self._show_thinking or not piece.thinking:
                self._out.write(piece.text)
        if pieces:
            self._out.flush()

    def end(self, finish_reason: str | None = None) -> None:
        """Note that the reply has ended; finish_reason None: how is no matter here."""
        if self._thinks:
            self._turn(False)
        self._out.write(ENDINGS.get(finish_reason, "") + "\n")
        self._out.flush()

    def _turn(self, thinks: bool) -> None:
        self._thinks = thinks
        if self._show_thinking:
            self._out.write(f"{self._dim}{THINK}\n" if thinks else f"\n{END_OF_THINKING}{self._plain}\n\n")


def written(answer: Answer, show_thinking: bool) -> str:
    """Return a whole reply as Voice writes it where there are no colours."""
    thinking = f"{THINK}\n{answer.thinking}\n{END_OF_THINKING}\n\n" if show_thinking and answer.thinking else ""
    return thinking + answer.text


def side_by_side(names: Sequence[str], texts: Sequence[str], width: int) -> str:
    """Lay texts under their names, in columns where `width` characters hold them, else one below the other."""
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < NARROWEST:
        return "\n\n".join(f"{name}:\n{text}" for name, text in zip(names, texts, strict=True))
    columns = [
        [name, "-" * column, *(line for part in text.split("\n") for line in _lines(part, column))]
        for name, text in zip(names, texts, strict=True)
    ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(cell + " " * (column - _width(cell)) for cell in row).rstrip() for row in rows)


def _lines(text: str, width: int) -> list[str]:
    """Return `text` in lines of at most `width` columns; characters of East Asia take two."""
    lines = []
    for line in textwrap.wrap(text, width, drop_whitespace=False, replace_whitespace=False) or [""]:
        while _width(line) > width:
            cut = next(n for n in range(len(line), 0, -1) if _width(line[:n]) <= width)
            lines.append(line[:cut])
            line = line[cut:]
        lines.append(line.strip())
    return lines


def _width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)
