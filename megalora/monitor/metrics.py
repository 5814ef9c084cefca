"""Numbers of the run in files: JSON lines, and TensorBoard events under runs/.

A resumed run takes out what an earlier start wrote about the steps that are done again, so both read as if
the run had never been interrupted.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megalora.files import open_own, refuse_link, write_file

METRICS = "metrics.jsonl"
EVALUATIONS = "eval_metrics.jsonl"
REPLIES = "replies.jsonl"  # to the sample prompts
_LINE_BYTES = 1 << 20  # a longer line is none of ours


class JsonLines:
    """Appends records to `path`, flushed one by one. Lines of steps after `resumed_step` are removed.

    A number that is not finite has no JSON: it becomes null. A record whose loss or grad_norm is so gets
    `"skipped": true`.
    lazy       make no file before there is a record
    last_step  of the last line that an earlier start wrote and that stays; 0: there is none
    damage     which lines were not as they were written, and were left out
    Raises OSError, and UserError where `path` is a link.
    """

    def __init__(self, path: Path, resumed_step: int = 0, lazy: bool = False):
        self._path, self._file = path, None
        self.last_step, self.damage = 0, None
        if lazy and not path.exists() and not path.is_symlink():
            return
        self._file = open_own(path)  # before anything is read: it refuses a link or a pipe
        self.last_step, self.damage = _truncate(path, resumed_step)
        self._file.close()
        self._file = open_own(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record; floats keep full precision (repr)."""
        line = dict(record)
        if not all(_finite(line.get(name)) for name in ("loss", "grad_norm")):
            line["skipped"] = True
        if self._file is None:
            self._file = open_own(self._path)
        self._file.write(json.dumps(_without_nan(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Put the lines on disk. Raises OSError."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class EventWriter:
    """TensorBoard events in `folder`. `missing` says why there are none, None when there are."""

    def __init__(self, folder: Path, resumed_step: int = 0):
        refuse_link(folder)
        self.missing: str | None = None
        self._writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.missing = f"the tensorboard package is not usable ({error})"
            return
        before = threading.enumerate()
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)
        self._hook = _without_tracebacks([thread for thread in threading.enumerate() if thread not in before])

    def write(self, record: Mapping[str, Any], group: str) -> None:
        """Write every finite number of the record as a scalar `group/name` (`group/outer/name` where nested)."""
        if self._writer is not None:
            for name, value in scalars(record, group):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            finally:
                if threading.excepthook is self._hook[0]:
                    threading.excepthook = self._hook[1]


def _without_tracebacks(writers: Sequence[threading.Thread]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Print no traceback of what ends the threads that write events: the next `write` raises it, to be told in a line.

    Returns the hook that was set, and the one before it.
    """
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        if arguments.thread not in writers:
            before(arguments)

    threading.excepthook = hook
    return hook, before


def losses(path: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of every line that has both; a loss of null, which was not finite, is NaN. Raises OSError."""
    found: list[tuple[int, float]] = []
    if not path.exists():
        return found
    with path.open("rb") as lines:
        for line in iter(lambda: lines.readline(_LINE_BYTES), b""):
            step = _step_of(line)
            loss = json.loads(line).get("loss", "") if step is not None else ""
            if loss is None or (isinstance(loss, (int, float)) and not isinstance(loss, bool)):
                found.append((step, math.nan if loss is None else float(loss)))
    return found


def _truncate(path: Path, last_step: int) -> tuple[int, str | None]:
    """Keep the lines of steps up to `last_step`, in their order; what is no such line goes.

    Returns the step of the last line that is kept (0: none), and which lines were damaged. A last line without its end
    was torn by a crash, which is no damage.
    """
    steps, damaged = list[int](), []

    def write_kept(new: BinaryIO) -> None:
        with path.open("rb") as old:
            for number, line in enumerate(iter(lambda: old.readline(_LINE_BYTES), b""), 1):
                step = _step_of(line)
                if step is None or (steps and step <= min(steps[-1], last_step)):
                    damaged.append((number, line))
                elif step <= last_step > 0:  # a fresh run keeps nothing, its step 0 neither
                    new.write(line)
                    steps.append(step)

    write_file(path, write_kept)
    if damaged and not damaged[-1][1].endswith(b"\n"):
        damaged.pop()
    numbers = ", ".join(str(number) for number, _ in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
    return steps[-1] if steps else 0, f"{path}: damaged lines are left out: {numbers}" if damaged else None


def _step_of(line: bytes) -> int | None:
    """Return the step of a whole line; None where it is none of ours."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return value if _finite(value) else None


def scalars(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield `prefix/name` (`prefix/outer/name` where nested) and value of every finite number of a record but its step.
    """
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
            yield f"{prefix}/{name}", value
