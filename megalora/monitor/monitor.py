"""What a run shows of itself: console, metrics.jsonl and trackers behind one object, on rank 0 only."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megalora.errors import UserError
from megalora.monitor.console import Console
from megalora.monitor.metrics import EVALUATIONS, METRICS, REPLIES, JsonLines, losses
from megalora.monitor.trackers import About, Trackers


class Monitor:
    """Shows and writes the run on rank 0; on other ranks every method returns at once.

    output_dir: folder of the run, made where missing. total_steps: last step of the run. resumed_step: steps
    done before this start (0: a fresh run); what an earlier start wrote about later steps is taken out, so
    that the files are those of a run that was never interrupted. log: takes each line of the console too.
    report_to: names of trackers, None: TensorBoard where it can be had; they are told the settings.
    UserError where output_dir cannot be written. A file that cannot be written later (a full disk) sets `failed`;
    `check` raises it, because the ranks that wait for this one must stop with it.
    """

    def __init__(
        self,
        output_dir: str | Path,
        rank: int,
        total_steps: int,
        resumed_step: int = 0,
        log: Callable[[str], None] = lambda line: None,
        report_to: tuple[str, ...] | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self._active = rank == 0
        self._problem: UserError | None = None
        if not self._active:
            return
        self._folder = folder = Path(output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = JsonLines(folder / METRICS, resumed_step)
            self._evaluations = JsonLines(folder / EVALUATIONS, resumed_step, lazy=True)
            self._replies = JsonLines(folder / REPLIES, resumed_step, lazy=True)
            self._console = Console(total_steps, resumed_step, log=log)
            self._trackers = Trackers(About(folder, resumed_step, report_to, settings or {}), self._console.note)
        except OSError as error:
            raise UserError(f"output_dir {folder} cannot be written ({error})", "give a folder that can") from error
        self._earlier = losses(folder / EVALUATIONS)
        for lines in (self._metrics, self._evaluations, self._replies):
            if lines.damage:
                self.note(lines.damage)

    def summary(self, sections: Mapping[str, Mapping[str, Any]]) -> None:
        """Print the start-up table: {section: {name: value}}, in this order."""
        if self._active:
            self._console.summary(sections)

    def progress(self, step: int) -> None:
        """Show that `step` steps are done: move the bar. For the steps that are not logged; `step` does it itself."""
        if self._active:
            self._console.progress(step)

    def step(self, record: Mapping[str, Any]) -> None:
        """Log one step: plain numbers step, loss, learning_rate, grad_norm, tokens, tokens_per_second.

        More entries are written as they are; a nested {phase: seconds} under "phases" is also shown. A loss
        or gradient norm that is not finite marks the step as skipped.
        """
        if self._active:
            self._write(self._metrics, record, "train")
            self._console.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Log one evaluation: step, loss and the task's other metrics, as plain numbers. Written to eval_metrics.jsonl.
        """
        if self._active:
            self._write(self._evaluations, record, "eval")
            self._console.evaluation(record)

    def replies(self, step: int, replies: Sequence[Mapping[str, Any]]) -> None:
        """Write what the model says to the sample prompts after `step` steps: prompt, response, finish_reason of each.
        """
        if self._active and self._problem is None:
            try:
                self._replies.write({"step": step, "replies": list(replies)})
            except OSError as error:
                self._problem = self._explained(f"step {step}", error)
            self._console.replies(step, replies)

    @property
    def last_replies(self) -> int:
        """Step of the last replies that earlier starts have written, 0 where there are none; on rank 0."""
        return self._replies.last_step

    @property
    def earlier_evaluations(self) -> list[tuple[int, float]]:
        """(step, loss) of the evaluations that earlier starts have made; on rank 0."""
        return self._earlier

    @property
    def failed(self) -> bool:
        """Whether a file could not be written: `check` will raise it."""
        return self._problem is not None

    def check(self) -> None:
        """Raise UserError where a file could not be written."""
        if self._problem is not None:
            raise self._problem

    def sync(self) -> None:
        """Put what was written so far on disk; from any thread. Raises OSError."""
        if self._active:
            self._metrics.sync()
            self._evaluations.sync()
            self._replies.sync()

    def _write(self, lines: JsonLines, record: Mapping[str, Any], group: str) -> None:
        if self._problem is not None:
            return
        try:
            lines.write(record)
            self._trackers.write(record, group)
        except OSError as error:
            self._problem = self._explained(f"step {record['step']}", error)

    def _explained(self, what: str, error: OSError) -> UserError:
        if not self._folder.exists():
            return UserError(
                f"output_dir {self._folder}: is gone, so that {what} cannot be logged",
                "see who removes it, and give the same command again: it begins anew",
            )
        fix = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make output_dir writable"
        return UserError(
            f"output_dir {self._folder}: {what} cannot be logged ({error.strerror or error})",
            f"{fix}, and give the same command again: it goes on from its newest checkpoint, where it has one",
        )

    def note(self, text: str) -> None:
        """Print a line for the user that leaves the bar whole."""
        if self._active:
            self._console.note(text)

    def close(self) -> None:
        """End the bar and flush the files; more calls do nothing. Raises UserError where that does not work."""
        if self._active:
            self._active = False
            self._console.close()
            for file in (self._metrics, self._evaluations, self._replies, self._trackers):
                try:
                    file.close()
                except OSError as error:
                    if self._problem is None:  # else it is that error again
                        raise self._explained("its last step", error) from None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
