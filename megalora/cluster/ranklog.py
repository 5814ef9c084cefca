"""One log file a rank. Rank 0 speaks at the terminal; of the others only faults are seen there."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TextIO

from megalora.errors import UserError
from megalora.files import open_own


class RankLog:
    """{folder}/rank_00003.log, appended to by every start of the run.

    As a context manager it also sends there what ranks other than 0 print, libraries of any language included.
    Raises UserError where the folder cannot be written, or the file is a link.
    """

    def __init__(self, folder: str | Path, rank: int, host: str):
        self._rank, self._host = rank, host
        self.path = Path(folder) / f"rank_{rank:05d}.log"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file: TextIO = open_own(self.path)
        except OSError as error:
            said = f"log_dir {folder} (in output_dir unless it is given) cannot be written ({error.strerror})"
            raise UserError(f"{said}", "make it writable, or name another output_dir") from error
        self._terminal: dict[int, int] = {}  # descriptors of the terminal, by the one they stand in for
        self.write(f"---- rank {rank} on {host}, process {os.getpid()}")

    def write(self, text: str) -> None:
        """Write lines with the time before them. A disk that is full costs the lines, not the run."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            for line in text.splitlines():
                self.file.write(f"{stamp} {line}\n")
        except (OSError, ValueError):
            pass

    def say(self, text: str) -> None:
        """Tell a fault on the terminal: with host and rank before it on ranks other than 0. It is in the file too."""
        self.write(text)
        mark = "" if self._rank == 0 else f"[{self._host}, rank {self._rank}] "
        if 2 in self._terminal:
            os.write(self._terminal[2], f"{mark}{text}\n".encode())
        else:
            print(mark + text, file=sys.stderr, flush=True)

    def __enter__(self) -> RankLog:
        if self._rank != 0:
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                stream.flush()
                self._terminal[number] = os.dup(number)
                os.dup2(self.file.fileno(), number)
        return self

    def __exit__(self, *error: object) -> None:
        for (number, terminal), stream in zip(self._terminal.items(), (sys.stdout, sys.stderr), strict=False):
            stream.flush()
            os.dup2(terminal, number)
            os.close(terminal)
        self._terminal = {}
        self.file.close()
