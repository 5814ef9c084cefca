"""How far a long copy of bytes is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LINE_SECONDS = 10.0


class ByteProgress:
    """A context manager; `advance` is told the bytes done since it was last called. file: default stderr."""

    def __init__(
        self, total: int, what: str, file: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._total, self._what, self._file = total, what, file or sys.stderr
        self._done, self._clock, self._said = 0, clock, clock()
        # Asked of the file and not of rich, which FORCE_COLOR (set by CI) leads to draw a bar in a log.
        self._bar: Progress | None = None
        if self._file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            columns = (TextColumn(what, markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            console = Console(file=self._file, force_terminal=True)
            self._bar = Progress(*columns, TimeRemainingColumn(compact=True), console=console)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], nbytes)
            return
        if self._clock() - self._said >= _LINE_SECONDS:
            self._said = self._clock()
            done, total = self._done / 1e9, self._total / 1e9
            print(f"{self._what}: {done:.2f} of {total:.2f} GB", file=self._file, flush=True)
