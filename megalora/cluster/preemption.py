"""SIGUSR1, SIGTERM and Ctrl-C ask a run to leave: it finishes its step, saves, and exits so that it can go on later."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from megalora.cluster.handlers import tell
from megalora.errors import Interrupted, Preempted

CTRL_C = "Ctrl-C"
MARK = "MEGALORA_PREEMPTED_FILE"  # set by scripts/slurm/launch.sh, which has torchrun between itself and the ranks


class Preemption:
    """`with Preemption() as preemption:` around a run, and `preemption.steps()` where its steps begin.

    Before the steps nothing is worth saving: SIGUSR1 raises Preempted at once, and SIGTERM ends the process.
    From then on either only sets `asked`, which all ranks must agree on after a step. So does Ctrl-C (SIGINT): a second
    one leaves at once. Before the steps it does so too.
    Only the main thread of a process can have it; elsewhere it never asks.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    @property
    def asked(self) -> bool:
        return self.signal_name is not None

    def steps(self) -> None:
        """Note that the steps begin."""
        if self._before:
            for number in self._before:
                signal.signal(number, self._ask)
            if MARK not in os.environ:  # else whoever interrupts the job would have it queued again
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
            signal.signal(signal.SIGUSR1, self._leave)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # launch.sh has it ignored until here
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            if isinstance(error, Preempted) and not isinstance(error, Interrupted):
                # The first rank to leave has srun end the others, which are leaving too.
                handler = signal.SIG_IGN
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name == CTRL_C:
            raise KeyboardInterrupt
        self.signal_name = CTRL_C
        if int(os.environ.get("RANK", "0") or 0) == 0:
            tell("\nmegalora: saving after this step; Ctrl-C again leaves at once")

    def _leave(self, number: int, frame: FrameType | None) -> None:
        raise Preempted(f"stopped by {signal.Signals(number).name} before its first step: nothing is lost")


def exit_status(left: Preempted) -> int:
    """Return the exit status of a rank that was preempted. Under launch.sh's torchrun, which takes any status but 0 for
    a failure to fix by a restart, it is 0, and a file says so in its place.
    """
    mark = os.environ.get(MARK)
    if mark:
        Path(mark).touch()
        return 0
    return left.status
