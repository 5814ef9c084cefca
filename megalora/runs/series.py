"""Numbers of a JSON-lines file that grows: read once, then only what is new, and thinned out for a screen.

A file of many lines is looked at in two ways: a sample of its lines, and what comes after it, give a curve at once,
and `read_on` reads the whole of it piece by piece. A run that starts over rewrites its file, which is then read anew.
"""

from __future__ import annotations

import json
import os
import stat
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LINE_BYTES = 1 << 20  # a longer line is none of a run's
MOST_FIELDS = 200
SAMPLE_LINES = 600
_PIECE = 1 << 20  # bytes that are parsed at a time
_MARK = 64  # bytes before the place that has been read, by which a file that was rewritten is noticed


@dataclass
class Columns:
    """steps and values of each field, in the order of the file. A field that a line lacks has no value there."""

    steps: dict[str, array] = field(default_factory=dict)
    values: dict[str, array] = field(default_factory=dict)
    last_step: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the finite numbers of a line; `phases/forward` is a number of an inner object."""
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
            return
        self.last_step = max(self.last_step, step)
        for name, value in _numbers(record):
            if name not in self.steps:
                if len(self.steps) >= MOST_FIELDS:
                    continue
                self.steps[name], self.values[name] = array("d"), array("d")
            self.steps[name].append(step)
            self.values[name].append(value)

    def latest(self) -> dict[str, float]:
        """Return the numbers of the last step."""
        ends = {name: steps[-1] for name, steps in self.steps.items()}
        return {name: self.values[name][-1] for name, step in ends.items() if step == self.last_step}


class GrowingFile:
    """A file of JSON lines. columns: what is read of it; complete: whether that is all there is."""

    def __init__(self, path: Path):
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._read, self._mark = 0, b""
        self._identity: tuple[int, int] | None = None
        self._whole = Columns()
        self._sample: Columns | None = None
        self._sampled_to = 0  # up to which byte the sample has the last lines
        self.complete = False
        self.version = 0

    @property
    def columns(self) -> Columns:
        return self._whole if self._sample is None else self._sample

    def look(self) -> None:
        """Read what is new where that is little; of much more, a sample. Never raises for what is in the file."""
        size = self._check()
        if size is None or size == self._read:
            self.complete = size is not None
            return
        if size - self._read <= _PIECE:
            self.read_on()
        elif self._sample is None:
            self._sample = self._sampled(size)
            self.complete = False
            self.version += 1
        elif size > self._sampled_to:
            self._sample_on()

    def read_on(self) -> bool:
        """Read the next piece, and return whether there is more."""
        size = self._check()
        if size is None:
            return False
        with self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read(_PIECE)
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) < _PIECE:  # a line that is not whole yet
            self._settle()
            return False
        end = end or len(data)  # no line is as long: it is skipped
        for record in _records(data[:end].splitlines()):
            self._whole.add(record)
        self._mark = (self._mark + data[:end])[-_MARK:]
        self._read += end
        self.version += 1
        if len(data) == _PIECE:
            return True
        self._settle()
        return False

    def _settle(self) -> None:
        """Drop the sample: all whole lines are read."""
        if self._sample is not None or not self.complete:
            self._sample, self.complete = None, True
            self.version += 1

    def _check(self) -> int | None:
        """Return the size of the file; None where there is none. Forgets all where the file is another."""
        try:
            found = os.stat(self._path)
            if not stat.S_ISREG(found.st_mode):
                return None
            identity = found.st_dev, found.st_ino
            another = self._identity is not None and identity != self._identity
            shorter = found.st_size < max(self._read, self._sampled_to)
            if shorter or (another and (self._sample is not None or not self._same())):
                self._forget()
            self._identity = identity
            return found.st_size
        except OSError:
            return None

    def _same(self) -> bool:
        """Return whether what has been read is still there, in a file of another inode: a resumed run writes it anew.
        """
        with self._path.open("rb") as file:
            file.seek(self._read - len(self._mark))
            return file.read(len(self._mark)) == self._mark

    def _sampled(self, size: int) -> Columns:
        columns = Columns()
        lines = []
        with self._path.open("rb") as file:
            for number in range(SAMPLE_LINES):
                file.seek(size * number // SAMPLE_LINES)
                if number:
                    file.readline(LINE_BYTES)
                lines.append(file.readline(LINE_BYTES))
            start = max(0, size - (1 << 16))
            file.seek(start)
            data = file.read()
        end = data.rfind(b"\n") + 1
        lines += data[:end].splitlines()[1:]
        self._sampled_to = start + end
        seen = -1
        for record in _records(lines):
            if isinstance(record.get("step"), int) and record["step"] > seen:
                seen = record["step"]
                columns.add(record)
        return columns

    def _sample_on(self) -> None:
        """Take the lines that have come since the sample was taken into it."""
        assert self._sample is not None
        with self._path.open("rb") as file:
            file.seek(self._sampled_to)
            data = file.read(_PIECE)
        end = data.rfind(b"\n") + 1
        for record in _records(data[:end].splitlines()):
            if isinstance(record.get("step"), int) and record["step"] > self._sample.last_step:
                self._sample.add(record)
        self._sampled_to += end
        self.version += bool(end)


def thinned(
    columns: Columns, name: str, first: float, last: float, points: int
) -> tuple[Sequence[float], Sequence[float]]:
    """Return (steps, values) of a field from step `first` to `last`; all values where there are at most `points`.

    Of more, the least and the greatest in each of points / 2 parts of the range, so that no spike is lost.
    """
    if name not in columns.steps:
        return [], []
    count = len(columns.values[name])  # a reading thread may add to both, values last
    steps = np.frombuffer(columns.steps[name][:count])
    values = np.frombuffer(columns.values[name][:count])
    inside = (steps >= first) & (steps <= last)
    steps, values = steps[inside], values[inside]
    if len(steps) > points:
        size = -(-len(steps) // max(1, points // 2))
        whole = len(steps) // size * size
        parts = values[:whole].reshape(-1, size)
        begins = np.arange(0, whole, size)
        ends = [0, len(steps) - 1]
        if whole < len(steps):
            ends += [whole + int(values[whole:].argmin()), whole + int(values[whole:].argmax())]
        chosen = np.unique(np.concatenate([begins + parts.argmin(1), begins + parts.argmax(1), ends]))
        steps, values = steps[chosen], values[chosen]
    return steps.tolist(), values.tolist()


def _records(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects among lines of JSON."""
    try:  # all at once takes half the time
        records = json.loads(b"[" + b",".join(line for line in lines if line.strip()) + b"]")
        if len(records) == sum(bool(line.strip()) for line in lines):
            yield from (record for record in records if isinstance(record, dict))
            return
    except (ValueError, RecursionError):
        pass
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict) and not prefix:
            yield from _numbers(value, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and (prefix or name != "step"):
            if abs(value) < 1e300:
                yield prefix + name, float(value)
