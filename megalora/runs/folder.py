"""One run's output_dir: its curves, the flags it was started with, and what its logs note."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import YAML_BYTES, yaml_pairs
from megalora.runs.series import GrowingFile, thinned

METRICS, EVALUATIONS, SETTINGS = "metrics.jsonl", "eval_metrics.jsonl", "run.yaml"
EVALUATION = "eval/"  # before the names of numbers of evaluations
REPLIES, TIMELINE, MARK = "replies.jsonl", "profile/schedule.svg", ".megalora.json"
MOST_RUNS = 200
_LOG_BYTES, _MOST_LOGS, _MOST_NOTES = 1 << 18, 64, 300
_REPLIES_BYTES, _MOST_REPLIES, _TIMELINE_BYTES = 4 << 20, 50, 8 << 20
_MARK_BYTES, _LARGEST_AXIS = 1 << 20, 1024
_OF_REPLIES = ("prompt", "image", "response", "finish_reason")
_ODD = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)  # of lines that are not ours
_STEP = re.compile(r"step (\d+)/(\d+) ")
_STARTED = re.compile(r"# megalora [^\n]*started in ([^\n]*); flags")
_ADAPTER = "peft/adapter_config.json"
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
_ROUTINE = re.compile(r"step \d+(/\d+)? (\(epoch|loss|by phase)|step \d+: (evaluation|to ['\"])")
_FAULT = re.compile(r"error|Traceback|nan|not finite|skipped|lost|died|hang|damaged|killed|Error", re.IGNORECASE)


@dataclass(frozen=True)
class Note:
    """A line of a log that is not of a step. fault: it speaks of something that went wrong."""

    time: str
    text: str
    rank: int
    fault: bool


class Run:
    """A run that is looked at. name: for people; the folder's, with as much before it as tells runs apart."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._total: tuple[str, int | None] | None = None  # (version, steps)
        self._settings: tuple[str, dict[str, str]] | None = None  # (the file, its flags)
        self._layout: tuple[str, dict[str, Any] | None] | None = None  # (the file, what it says)
        self._files = {"": GrowingFile(folder / METRICS), EVALUATION: GrowingFile(folder / EVALUATIONS)}

    def look(self) -> None:
        """Read what is new."""
        for file in self._files.values():
            file.look()

    def read_on(self) -> bool:
        """Read a piece of what is left of large files, and return whether there is more."""
        return any([file.read_on() for file in self._files.values() if not file.complete])

    @property
    def version(self) -> str:
        """A text that changes when there is something new."""
        return "-".join(str(file.version) for file in self._files.values())

    @property
    def complete(self) -> bool:
        return all(file.complete or not file.columns.steps for file in self._files.values())

    def fields(self) -> list[str]:
        """Return the names of all numbers."""
        return [prefix + name for prefix, file in self._files.items() for name in file.columns.steps]

    def series(self, name: str, first: float, last: float, points: int) -> tuple[Sequence[float], Sequence[float]]:
        """Return (steps, values) of one of `fields`, as `thinned` does."""
        prefix = EVALUATION if name.startswith(EVALUATION) else ""
        return thinned(self._files[prefix].columns, name.removeprefix(prefix), first, last, points)

    def summary(self) -> dict[str, Any]:
        """Return what a list of runs shows."""
        columns = self._files[""].columns
        try:
            updated: float | None = (self.folder / METRICS).stat().st_mtime
        except OSError:
            updated = None
        return {
            "name": self.name,
            "folder": str(self.folder),
            "version": self.version,
            "complete": self.complete,
            "last_step": columns.last_step,
            "total_steps": self._total_steps(),
            "seconds_ago": None if updated is None else max(0.0, time.time() - updated),
            "latest": columns.latest(),
            "fields": self.fields(),
        }

    def told(self) -> dict[str, Any]:
        """Return what the page holds of a run at any time: its summary, settings and layout."""
        return self.summary() | {"settings": self.settings(), "layout": self.layout()}

    def serve_command(self) -> str | None:
        """Return the command line that talks with the run's adapter; None where there is none (yet) to be served."""
        try:
            adapter = json.loads(_tail(self.folder / _ADAPTER, _MARK_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        model = self.settings().get("model_path")
        if model is None or not isinstance(adapter, dict) or adapter.get("task_type") != "CAUSAL_LM":
            return None
        if not _may_be_served(adapter):
            return None
        started = _STARTED.match(self._settings[0] if self._settings else "")
        if started and not os.path.isdir(model) and os.path.isdir(from_there := os.path.join(started[1], model)):
            model = from_there
        here = Path.cwd()
        folder = self.folder.relative_to(here) if self.folder.is_relative_to(here) else self.folder
        return shlex.join(["megalora", "serve", "--model_path", model, "--adapters", f"tuned={folder}"])

    def settings(self) -> dict[str, str]:
        """Return the flags that the run was started with, as text by name. Empty where there are none to be read."""
        import yaml

        try:
            text = _tail(self.folder / SETTINGS, YAML_BYTES)
        except OSError:
            return {}
        if self._settings is None or self._settings[0] != text:
            try:
                found = yaml_pairs(text) or []
            except (yaml.YAMLError, ValueError):
                found = []
            self._settings = text, {str(name): _shown(value) for name, value in found}
        return self._settings[1]

    def notes(self) -> list[Note]:
        """Return the newest lines of the logs that are not of steps: of rank 0 all, of others what speaks of faults."""
        found: list[Note] = []
        for rank, file in self._logs():
            before = ""
            for line in _lines(file):
                stamp = _STAMP.match(line)
                before = stamp[0].strip() if stamp else before
                text = line[stamp.end() :] if stamp else line
                fault = bool(_FAULT.search(text)) and not _ROUTINE.match(text)
                if text.strip() and not _ROUTINE.match(text) and (rank == 0 or fault):
                    found.append(Note(before, text[:2000], rank, fault))
        return sorted(found, key=lambda note: note.time)[-_MOST_NOTES:]

    def replies(self) -> list[dict[str, Any]]:
        """Return [{"step", "replies": [{"prompt", "image", "response", "finish_reason"}]}] of the newest lines of
        replies.jsonl, and of its first. image: its path, "" where the prompt has none."""
        try:
            with open(self.folder / REPLIES, "rb", opener=_open) as stream:
                lines = [stream.readline(_REPLIES_BYTES)]
            whole = _tail(self.folder / REPLIES, _REPLIES_BYTES).splitlines(keepends=True)
        except OSError:
            return []
        found: dict[int, dict[str, Any]] = {}
        for line in [lines[0].decode("utf-8", "replace"), *whole[-_MOST_REPLIES:]]:
            with contextlib.suppress(*_ODD):
                record = json.loads(line)
                told = [{name: str(one.get(name, "")) for name in _OF_REPLIES} for one in record["replies"]]
                found[int(record["step"])] = {"step": int(record["step"]), "replies": told}
        return [found[step] for step in sorted(found)]

    def layout(self) -> dict[str, Any] | None:
        """Return how the run is divided over its processes, as the mark in its folder has it; None where it has not."""
        try:
            text = _tail(self.folder / MARK, _MARK_BYTES)
        except OSError:
            return None
        if self._layout is None or self._layout[0] != text:
            self._layout = text, _layout_of(text)
        return self._layout[1]

    def timeline(self) -> str | None:
        """Return the drawing (SVG) of what each stage computed when, where the run was profiled."""
        try:
            return _tail(self.folder / TIMELINE, _TIMELINE_BYTES)
        except OSError:
            return None

    def _total_steps(self) -> int | None:
        """Return the last step that rank 0's log counts up to."""
        if self._total is None or self._total[0] != self.version:  # logs grow with the numbers
            lines = [line for _, file in self._logs()[:1] for line in _lines(file)]
            found = next((match for line in reversed(lines) if (match := _STEP.search(line))), None)
            self._total = self.version, None if found is None else int(found[2])
        return self._total[1]

    def _logs(self) -> list[tuple[int, Path]]:
        try:
            files = sorted((self.folder / "logs").glob("rank_*.log"))[:_MOST_LOGS]
        except OSError:
            return []
        numbered = [(re.fullmatch(r"rank_(\d{1,9})\.log", file.name), file) for file in files]
        return [(int(match[1]), file) for match, file in numbered if match]


def _may_be_served(adapter: dict[str, Any]) -> bool:
    """Return whether `megalora serve --adapters` may take such an adapter_config.json (megalora.serving.adapters)."""
    whole = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
    return not any(adapter.get(field) for field in whole) and adapter.get("bias", "none") == "none"


def find_runs(folders: Sequence[str]) -> list[Path]:
    """Return the runs: each folder that is one, or those in it. Raises UserError where a folder is not there."""
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"runs {folder} is not a folder", "name the output_dir of a run, or a folder of runs")
        found += [folder] if is_run(folder) else sorted(inner for inner in folder.iterdir() if is_run(inner))
    return list(dict.fromkeys(folder.resolve() for folder in found))[:MOST_RUNS]


def is_run(folder: Path) -> bool:
    """Return whether a folder is the output_dir of a run."""
    return (folder / METRICS).is_file() or (folder / SETTINGS).is_file()


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder: its own, with as many of the folders above it as tell it from the others."""
    parts = [folder.parts for folder in folders]
    names = []
    for own in parts:
        count = 1
        while count < len(own) and sum(own[-count:] == other[-count:] for other in parts) > 1:
            count += 1
        names.append("/".join(own[-count:]).lstrip("/"))
    return names


def _lines(file: Path) -> Iterator[str]:
    try:
        yield from _tail(file, _LOG_BYTES).splitlines()
    except OSError:
        return


def _tail(file: Path, most: int) -> str:
    """Return the end of a regular file. Raises OSError."""
    with open(file, "rb", opener=_open) as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - most))
        return stream.read(most).decode("utf-8", "replace")


def _open(path: str, flags: int) -> int:
    """Open without waiting, so that a pipe of that name holds nothing up."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: is not a regular file")
    return descriptor


def _layout_of(text: str) -> dict[str, Any] | None:
    """Return the layout in a mark: what is not as a run writes it is none."""
    try:
        told = json.loads(text)["layout"]
        sizes = {name: int(told[name]) for name in ("tensor", "pipeline", "context", "data")}
        stages: list[dict[str, Any]] = [
            {"layers": [[int(first), int(last)] for first, last in one["layers"]], "share": float(one["share"])}
            for one in told["stages"]
        ]
        schedule = str(told["schedule"])[:50]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    sound = all(1 <= size <= _LARGEST_AXIS for size in sizes.values()) and len(stages) == sizes["pipeline"]
    sound = sound and all(math.isfinite(stage["share"]) for stage in stages)
    return {**sizes, "schedule": schedule, "stages": stages} if sound else None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
