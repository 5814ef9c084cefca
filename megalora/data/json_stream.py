"""JSON read as a stream: a list of rows, one row, JSON Lines, or rows one after another, never held whole.

`read_values` takes any of these layouts. `read_lines` takes JSON Lines alone and leaves the lines unparsed, so that
other processes can parse them.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..errors import UserError
from ..files import RepeatedField, unique_fields

BLOCK = 1 << 20  # bytes read at a time
ROW_BYTES = 64 << 20  # of one row: a million tokens are 4 MB
_NEAR = 16  # an error this near to the end of what was read may be a value that goes on
_BOM = b"\xef\xbb\xbf"


def read_values(file: BinaryIO, name: str) -> Iterator[Any]:
    """Yield the rows of a file in order. UserError (`name`, line, column) where it is not UTF-8 or not JSON."""
    stream = _Stream(file, name)
    if stream.peek() != "[":
        while stream.peek():
            yield stream.value()
        return
    stream.step()
    if stream.peek() == "]":
        stream.step()
    else:
        while True:
            yield stream.value()
            mark = stream.peek()
            if mark not in ("]", ","):
                raise stream.error("Expecting ',' delimiter")
            stream.step()
            if mark == "]":
                break
    if stream.peek():
        raise stream.error("Extra data after the list of rows")


def read_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, the line) of the lines of a JSON Lines file that are not blank."""
    for number, line in enumerate(iter(lambda: file.readline(ROW_BYTES + 1), b""), 1):
        if len(line) > ROW_BYTES:
            raise too_long(f"{name} line {number}")
        line = (line.removeprefix(_BOM) if number == 1 else line).strip(b" \t\r\n")
        if line:
            yield number, line


def too_long(where: str) -> UserError:
    """Return the error of a row that is larger than any that is meant."""
    return UserError(f"{where}: a row of more than {ROW_BYTES:,} bytes", "split it")


def is_lines(file: BinaryIO) -> bool:
    """Return whether the first line of the file is a JSON object by itself."""
    first = file.readline(64 * BLOCK).removeprefix(_BOM)
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


class _Stream:
    """The text of a file from a place on: `_text[_at:]` and what is not read yet."""

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(object_pairs_hook=unique_fields)
        self._text, self._at = "", 0
        self._bytes = 0  # read from the file
        self._newlines = 0  # in the bytes read
        self._line, self._column = 1, 1  # of the start of _text
        self._ended = False

    def peek(self) -> str:
        """Return the next character that is no white space, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def step(self) -> None:
        self._at += 1

    def value(self) -> Any:
        """Return the JSON value that starts here."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _NEAR or error.msg.startswith("Unterminated string")
                behind = error.pos - self._at
                if cut and self._more():
                    continue
                raise self.error(error.msg, self._at + behind) from None
            except RepeatedField as error:
                raise self.error(str(error)) from None
            except (RecursionError, ValueError) as error:  # nested too deep, a number of thousands of digits
                raise UserError(f"{self._name}: JSON that cannot be read: {error}", "fix the file") from None
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._at = end
            return value

    def error(self, message: str, at: int | None = None) -> UserError:
        before = self._text[: self._at if at is None else at]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") if lines else self._column + len(before)
        return UserError(
            f"{self._name} line {self._line + lines} column {column}: bad JSON: {message}", "fix the file there"
        )

    def _more(self) -> bool:
        """Read on, at least as much as is waiting already, and drop what was passed. False at the end."""
        if self._ended:
            return False
        passed = self._text[: self._at]
        lines = passed.count("\n")
        self._column = len(passed) - passed.rfind("\n") if lines else self._column + len(passed)
        self._line += lines
        waiting = self._text[self._at :]
        if len(waiting) > ROW_BYTES:
            raise too_long(f"{self._name} from line {self._line}")
        data = self._file.read(max(BLOCK, len(waiting)))
        self._ended = not data
        try:
            self._text, self._at = waiting + self._decoder.decode(data, final=self._ended), 0
        except UnicodeDecodeError as error:
            held = len(error.object) - len(data)  # bytes of a character cut by the block before
            line = self._newlines + error.object.count(b"\n", 0, error.start) + 1
            at = self._bytes - held + error.start
            raise UserError(f"{self._name} line {line}: byte {at} is not UTF-8", "save the file as UTF-8") from None
        self._bytes += len(data)
        self._newlines += data.count(b"\n")
        return len(self._text) > len(waiting) or not self._ended
