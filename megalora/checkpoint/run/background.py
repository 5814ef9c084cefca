"""Saves off the training thread: it copies the state and goes on, a thread does everything else.

    training thread   step | copy | step | step | step | ...
    saving thread                 | pickle, write, fsync, hash, manifest, rename, tracker |
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megalora.checkpoint.run.state import CheckpointWriter, iteration_folder
from megalora.errors import UserError

WriteShard = Callable[[Path], Path]
_PATIENCE = 10.0  # seconds for the save under way when the run ends with an error that other ranks may not share


class HostCopy:
    """Copies of tensors in host memory that is kept from one round of copies to the next.

    reserve  tensors of the shapes and dtypes to come, so that the first round allocates nothing
    From a GPU the memory is pinned and the copies are made by the current stream: the host goes on at once, and the
    stream's later work finds the tensors already copied.
    """

    def __init__(self, reserve: Iterable[torch.Tensor] = ()):
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        self._taken: list[torch.Tensor] = []
        self._done: torch.cuda.Event | None = None
        for tensor in reserve:
            self._release(self._empty(tensor))

    def start(self) -> None:
        """Begin a new round: the copies of the one before may be overwritten."""
        self.wait()
        for copy in self._taken:
            self._release(copy)
        self._taken = []

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy by the same names; after `wait` they hold what the tensors hold now."""
        copies = {}
        for name, tensor in tensors.items():
            free = self._free[tensor.shape, tensor.dtype]
            copies[name] = free.pop() if free else self._empty(tensor)
            copies[name].copy_(tensor, non_blocking=True)
            self._taken.append(copies[name])
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._done = torch.cuda.Event()
            self._done.record()
        return copies

    def wait(self) -> None:
        """Wait until all copies of this round are made; from any thread."""
        if self._done is not None:
            self._done.synchronize()

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def _release(self, copy: torch.Tensor) -> None:
        self._free[copy.shape, copy.dtype].append(copy)


@dataclass(frozen=True)
class SaveReport:
    """A save that has ended well. Seconds: `stalled` of the training thread, `total` from its start to its end."""

    step: int
    folder: Path
    stalled: float
    total: float


class BackgroundSaves:
    """The saves of a run, one at a time, in a thread; every rank has one and makes the same calls.

    writer  its `gather` must use process groups that no other thread uses
    A save that fails fails on every rank (see `CheckpointWriter.save`), but each notices in its own time: `failed`
    says so, and `wait` raises. As a context manager it waits for the save under way.
    """

    def __init__(self, writer: CheckpointWriter):
        self._writer = writer
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._reports: list[SaveReport] = []

    @property
    def failed(self) -> bool:
        """Whether a save has ended with an error on this rank: `wait` will raise it."""
        return self._error is not None

    def start(self, step: int, snapshot: Callable[[], WriteShard], identity: Mapping[str, str]) -> Path:
        """Begin the save of `step`, and return the folder that it is going to be, once it is complete.

        snapshot  called here on the ranks that write: copies the state, and gives the function that writes the copy
                  (`CheckpointWriter.save`'s write_shard), which the thread calls
        Call `wait` before: one save at a time.
        """
        assert self._thread is None, "wait() first"
        begun = time.perf_counter()
        write = snapshot() if self._writer.writes else None
        stalled = time.perf_counter() - begun

        def save() -> None:
            try:
                folder = self._writer.save(step, write, identity)
                self._reports.append(SaveReport(step, folder, stalled, time.perf_counter() - begun))
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=save, name=f"save of step {step}", daemon=True)
        self._thread.start()
        return iteration_folder(self._writer.output_dir, step)

    def wait(self) -> None:
        """Wait until no save is under way. Raises the error of the last one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finished(self) -> list[SaveReport]:
        """Return the saves that have ended well since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def __enter__(self) -> BackgroundSaves:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # it needs all ranks, but not their training: worth a wait, if none has died
            self._thread.join(None if issubclass(kind, UserError) else _PATIENCE)
