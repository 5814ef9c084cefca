"""One run at a time in an output_dir: rank 0 holds {output_dir}/.lock from before it reads there until the run ends.

A process that is killed lets go of it by itself. A run that ends by itself removes the file too, and the folders that
it was made in where nothing else came to lie in them: what fails at its start leaves no trace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import TextIO

from megalora import files
from megalora.cluster.watch import host_name
from megalora.errors import UserError

LOCK = ".lock"
_SIGNATURE = "process "  # what a lock of ours begins with
_AGAIN = 0.1  # seconds between two tries


class RunLock:
    """`with RunLock(output_dir) as lock:` around a run, and `lock.take()`, on one rank, before it looks in there."""

    def __init__(self, output_dir: str | Path):
        self._folder = Path(output_dir)
        self._path = self._folder / LOCK
        self._file: TextIO | None = None  # closed in child processes, as Python has it: only this one holds the lock
        self._made: list[Path] = []  # folders, innermost first

    def take(self, wait: float) -> str | None:
        """Keep other runs out from now on. Return a note where the file system cannot do that.

        wait  seconds that a run which is about to end is waited for
        Raises UserError, which says who holds output_dir, that it cannot be written, or that the lock is a link.
        """
        deadline = time.monotonic() + wait
        while True:
            file = self._open()
            if file is None:
                return self._not_locked("a read-only file system")
            try:
                obstacle = files.lock(file.fileno())
            except BlockingIOError:
                with file:
                    holder = _content(file)
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"output_dir {self._folder}: another run is under way in it ({holder or 'no name given'})",
                        "wait for it or end it, or name another output_dir",
                    ) from None
                time.sleep(_AGAIN)
                continue
            if obstacle is not None:
                if _content(file):  # of a node that does have locks on this file system: its run may be under way
                    file.close()
                else:
                    self._remove(file)
                return self._not_locked(obstacle)
            if _lies_at(self._path, file):
                self._refuse_foreign(file)
                self._file = file
                _sign(file)
                return None
            file.close()  # the run before has removed it between our opening and locking it
            if time.monotonic() >= deadline:
                return self._not_locked("its name does not lead to the file that was made")

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            self._remove(file)

    def _open(self) -> TextIO | None:
        """Open the file; None on a read-only file system, where no run can harm another: what is to be written there
        says so.
        """
        try:
            with contextlib.suppress(FileNotFoundError):  # a run that failed at its start has just removed the folder
                return self._create()
            return self._create()
        except OSError as error:
            if error.errno == errno.EROFS:
                return None
            raise UserError(
                f"output_dir {self._folder}: cannot be written ({error.strerror or error})",
                "make it writable, or name another output_dir",
            ) from None

    def _create(self) -> TextIO:
        self._made = self._made or [f for f in (self._folder, *self._folder.parents) if not f.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        return files.open_own(self._path)

    def _refuse_foreign(self, file: TextIO) -> None:
        if (content := _content(file)) and not content.startswith(_SIGNATURE):
            file.close()
            raise UserError(f"{self._path}: was written by another program", "remove it, or name another output_dir")

    def _remove(self, file: TextIO) -> None:
        with file, contextlib.suppress(OSError):
            if _lies_at(self._path, file):  # else someone has cleared the folder, and perhaps begun another run
                self._path.unlink()  # while it is locked: who has it open sees, once it locks it, that it is gone
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()  # only where it is empty

    def _not_locked(self, why: str) -> str:
        return f"output_dir {self._folder} cannot be locked ({why}): a second run in it would not be told from this one"


def _sign(file: TextIO) -> None:
    """Say in the file who holds it. A disk that is full costs the words, not the run."""
    words = f"{_SIGNATURE}{os.getpid()} on {host_name()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)  # of what a run that was killed has left
        os.write(file.fileno(), words.encode())
        os.fsync(file.fileno())  # for the other nodes


def _content(file: TextIO) -> str:
    with contextlib.suppress(OSError):
        file.seek(0)
        return file.read(200).strip()
    return ""


def _lies_at(path: Path, file: TextIO) -> bool:
    """Return whether the open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False
