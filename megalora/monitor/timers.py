"""Seconds by phase (`wall_clock_breakdown`), without synchronisation inside a step.

Phases may nest (communication inside forward); every moment is counted once, for the innermost phase. Each
entry and exit leaves a mark: the host clock on CPU, a CUDA event in the current stream on GPU. The marks cut
time into intervals, and the lengths are only asked for in `collect`, at a logged step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

PHASES = ("forward", "backward", "communication", "optimizer", "data", "checkpoint")

_FOLD_AT = 4096  # marks that are kept before those already reached are added up
_NOTHING = contextlib.nullcontext()


class Timers:
    """`with timers("forward"): ...`, then `timers.collect()`.

    enabled: when False nothing is measured and a call costs one function call. device: a torch.device or its
    name; "cuda" measures what the GPU did in the current stream, which includes waiting for a collective or
    another stage. clock: host clock in seconds, for tests.

    One object serves all threads of a process: autograd's device threads only run while the main thread waits
    in its backward, so entries and exits stay in order.
    """

    def __init__(self, enabled: bool, device: Any = "cpu", clock: Callable[[], float] = time.perf_counter):
        self.enabled = enabled
        self._clock = _EventClock() if str(device).startswith("cuda") and enabled else _HostClock(clock)
        self._stack: list[str] = []
        self._marks: list[tuple[Any, str | None]] = []  # (mark, phase that runs from it to the next mark)
        self._seconds: dict[str, float] = {}

    def __call__(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """Return a context that counts its time for `phase`, one of PHASES."""
        return self._phase(phase) if self.enabled else _NOTHING

    def collect(self) -> dict[str, float]:
        """Return seconds of each phase seen since the last collect, in the order of PHASES; {} when disabled.

        On GPU it waits for the work issued so far: call it at logged steps only. A phase that is open goes
        on.
        """
        if not self.enabled:
            return {}
        if self._marks:
            self._mark()
            self._clock.wait(self._marks[-1][0])
            self._fold()
        seconds = {phase: self._seconds[phase] for phase in PHASES if phase in self._seconds}
        self._seconds = {}
        return seconds

    @contextlib.contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        assert phase in PHASES, phase
        self._stack.append(phase)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def _mark(self) -> None:
        self._marks.append((self._clock.mark(), self._stack[-1] if self._stack else None))
        if len(self._marks) % _FOLD_AT == 0:
            self._fold()

    def _fold(self) -> None:
        """Add up the intervals whose end the device has reached; the last mark starts the next interval."""
        folded = 0
        for (start, phase), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            if not self._clock.reached(end):
                break
            if phase is not None:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock.between(start, end)
            self._clock.release(start)
            folded += 1
        del self._marks[:folded]


class _HostClock:
    def __init__(self, clock: Callable[[], float]):
        self.mark = clock

    def wait(self, mark: float) -> None:
        pass

    def reached(self, mark: float) -> bool:
        return True

    def between(self, start: float, end: float) -> float:
        return end - start

    def release(self, mark: float) -> None:
        pass


class _EventClock:
    """CUDA events, used again once they are added up."""

    def __init__(self) -> None:
        self._free: list[Any] = []

    def mark(self) -> Any:
        import torch

        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def reached(self, mark: Any) -> bool:
        return mark.query()

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3

    def release(self, mark: Any) -> None:
        self._free.append(mark)
