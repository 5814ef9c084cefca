"""The run at the terminal: start-up table, progress bar or plain log lines, notes.

On a terminal a bar with loss, tokens/s and time left; elsewhere (a log file, CI) one plain line a logged
step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_LOG_WIDTH = 120  # columns of the table where there is no terminal to ask


class _Shown(RichConsole):
    """A reader who is gone (`| tee`, which the terminal gives the same Ctrl-C) costs the lines to come, not the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # what is left in the file's buffer would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Console:
    """total_steps: last step of the run. resumed_step: steps done before it. file: default stdout. log: takes a copy of
    each plain line, those too that a terminal shows as a bar."""

    def __init__(
        self,
        total_steps: int,
        resumed_step: int = 0,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        log: Callable[[str], None] = lambda line: None,
    ):
        self._log = log
        # Asked of the file and not of rich, which FORCE_COLOR (set by CI) leads to draw a bar in a log.
        self._terminal = (file or sys.stdout).isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._rich = _Shown(
            file=file,
            highlight=False,
            force_terminal=self._terminal,
            width=None if self._terminal else _LOG_WIDTH,
        )
        self._total, self._resumed = total_steps, resumed_step
        self._clock, self._start = clock, clock()
        self._bar: Progress | None = None

    def summary(self, sections: Mapping[str, Mapping[str, Any]]) -> None:
        """Print {section: {name: value}} as one table; values are shown by str()."""
        table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for section, rows in sections.items():
            for number, (name, value) in enumerate(rows.items()):
                table.add_row(Text("" if number else section), Text(name), Text(str(value)))
            table.add_section()
        self._rich.print(table)
        self._start = self._clock()  # time left is reckoned from here: loading comes before the table

    def progress(self, step: int, text: str | None = None) -> None:
        """Show that `step` steps are done; `text` replaces what the bar says beside the count."""
        if not self._terminal:
            return
        if self._bar is None:  # here and not in __init__: loading comes first, and would count as slow steps
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self._rich,
                speed_estimate_period=600,
            )
            self._bar.start()
            self._bar.add_task("", total=self._total, completed=self._resumed)
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=step)
        if text is not None:
            self._bar.update(task, description=text)

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one logged step: move the bar or print a line; "phases" is one more line."""
        step, loss, speed = (
            record["step"],
            _number(record.get("loss"), ".4f"),
            record.get("tokens_per_second"),
        )
        rate = f"{_number(speed, ',.0f')} tokens/s"
        epoch = f" (epoch {record['epoch']:.2f})" if "epoch" in record else ""
        parts = [
            f"step {step}/{self._total}{epoch}",
            f"loss {loss}",
            f"lr {_number(record.get('learning_rate'), '.3e')}",
            f"grad norm {_number(record.get('grad_norm'), '.4f')}",
            rate,
        ]
        if record.get("tflops") is not None:
            parts.append(_rate(record["tflops"] * 1e12))
        parts.append(f"{self._time_left(step)} left")
        if self._terminal:
            self.progress(step, f"loss {loss}  {rate}")
            self._log("  ".join(parts))
        else:
            self.note("  ".join(parts))
        phases = record.get("phases")
        if phases:
            seconds = "  ".join(f"{phase} {_number(value, '.3f')}s" for phase, value in phases.items())
            self.note(f"step {step} by phase: {seconds}")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Print one evaluation: its step, its loss, and the other metrics of the task; a line more for each set."""
        self.note(f"step {record['step']}: evaluation {_metrics(record)}")
        for name, one in record.items():
            if isinstance(one, Mapping):
                self.note(f"step {record['step']}: evaluation of {name}: {_metrics(one)}")

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        """Print the first reply to the sample prompts, as far as a line holds it."""
        for reply in replies[:1]:
            prompt, response = (" ".join(str(reply[name]).split()) for name in ("prompt", "response"))
            more = f" (and {len(replies) - 1} more in replies.jsonl)" if len(replies) > 1 else ""
            self.note(f"step {step}: to {_short(prompt, 40)!r} it says {_short(response, 60)!r}{more}")

    def note(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        self._log(text)
        self._rich.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _time_left(self, step: int) -> str:
        done = max(step - self._resumed, 1)
        seconds = round((self._clock() - self._start) / done * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _metrics(record: Mapping[str, Any]) -> str:
    others = {name: value for name, value in record.items() if name not in ("step", "loss")}
    told = [f"{name} {_number(value, '.4g')}" for name, value in others.items() if not isinstance(value, Mapping)]
    return ", ".join([f"loss {_number(record.get('loss'), '.4f')}", *told])


def _rate(flops: float) -> str:
    """Return FLOPs a second in the unit that fits: 412.3 TFLOP/s, 38.1 GFLOP/s."""
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:.1f} {unit}FLOP/s"
    return f"{flops / 1e6:.1f} MFLOP/s"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
