"""Numbers of the run in files: JSON lines, and TensorBoard events under runs/.

A resumed run takes out what an earlier start wrote about the steps that are done again, so both read as if
the run had never been interrupted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVALUATIONS = "eval_metrics.jsonl"


class JsonLines:
    """Appends records to `path`, flushed one by one. Lines of steps after `resumed_step` are removed.

    A number that is not finite has no JSON: it becomes null. A record whose loss or grad_norm is so gets
    `"skipped": true`. last_step: of the last line that an earlier start wrote and that stays; 0: there is none.
    """

    def __init__(self, path: Path, resumed_step: int = 0):
        self.last_step = _truncate(path, resumed_step) if path.exists() else 0
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Floats keep full precision (repr)."""
        line = dict(record)
        if not all(_finite(line.get(name)) for name in ("loss", "grad_norm")):
            line["skipped"] = True
        self._file.write(json.dumps(_without_nan(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Puts the lines on disk. Raises OSError."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class EventWriter:
    """TensorBoard events in `folder`. `missing` says why there are none, None when there are."""

    def __init__(self, folder: Path, resumed_step: int = 0):
        self.missing: str | None = None
        self._writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.missing = f"the tensorboard package is not usable ({error})"
            return
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, record: Mapping[str, Any], group: str) -> None:
        """Every finite number of the record as a scalar `group/name` (`group/outer/name` where nested)."""
        if self._writer is not None:
            for name, value in _scalars(record, group):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _truncate(path: Path, last_step: int) -> int:
    """Keep the lines of steps up to `last_step`; a line torn by a crash goes. Written aside, then renamed.

    Returns the step of the last line that is kept, 0 where none is.
    """
    aside, last_kept = path.with_name(path.name + ".tmp"), 0
    with path.open("rb") as old, aside.open("wb") as new:
        for line in old:
            try:
                step = int(json.loads(line)["step"])
                kept = line.endswith(b"\n") and step <= last_step
            except (ValueError, KeyError, TypeError):
                kept = False
            if kept:
                new.write(line)
                last_kept = step
        new.flush()
        os.fsync(new.fileno())
    aside.replace(path)
    return last_kept


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return value if _finite(value) else None


def _scalars(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
            yield f"{prefix}/{name}", value
