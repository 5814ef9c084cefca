"""What a run shows of itself: console, metrics.jsonl and TensorBoard behind one object, on rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megalora.errors import UserError
from megalora.monitor.console import Console
from megalora.monitor.metrics import EVALUATIONS, METRICS, EventWriter, JsonLines


class Monitor:
    """Shows and writes the run on rank 0; on other ranks every method returns at once.

    output_dir: folder of the run, made where missing. total_steps: last step of the run. resumed_step: steps
    done before this start (0: a fresh run); what an earlier start wrote about later steps is taken out, so
    that the files are those of a run that was never interrupted. UserError where output_dir cannot be
    written.
    """

    def __init__(self, output_dir: str | Path, rank: int, total_steps: int, resumed_step: int = 0):
        self._active = rank == 0
        if not self._active:
            return
        folder = Path(output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = JsonLines(folder / METRICS, resumed_step)
            self._evaluations = JsonLines(folder / EVALUATIONS, resumed_step)
            self._events = EventWriter(folder / "runs", resumed_step)
        except OSError as error:
            raise UserError(f"output_dir {folder} cannot be written ({error}): give a folder that can") from error
        self._console = Console(total_steps, resumed_step)
        if self._events.missing:
            self.note(f"TensorBoard is not written: {self._events.missing}")

    def summary(self, sections: Mapping[str, Mapping[str, Any]]) -> None:
        """The start-up table: {section: {name: value}}, in this order."""
        if self._active:
            self._console.summary(sections)

    def progress(self, step: int) -> None:
        """`step` steps are done: moves the bar. For the steps that are not logged; `step` does it itself."""
        if self._active:
            self._console.progress(step)

    def step(self, record: Mapping[str, Any]) -> None:
        """One logged step: plain numbers step, loss, learning_rate, grad_norm, tokens, tokens_per_second.

        More entries are written as they are; a nested {phase: seconds} under "phases" is also shown. A loss
        or gradient norm that is not finite marks the step as skipped.
        """
        if self._active:
            self._metrics.write(record)
            self._events.write(record, "train")
            self._console.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation: step, loss, perplexity, as plain numbers. Written to eval_metrics.jsonl."""
        if self._active:
            self._evaluations.write(record)
            self._events.write(record, "eval")
            self._console.evaluation(record)

    def note(self, text: str) -> None:
        """A line for the user that leaves the bar whole."""
        if self._active:
            self._console.note(text)

    def close(self) -> None:
        """Ends the bar and flushes the files; more calls do nothing."""
        if self._active:
            self._active = False
            self._console.close()
            self._metrics.close()
            self._evaluations.close()
            self._events.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
