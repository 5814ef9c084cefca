"""Starts a command on N processes of this host, as torchrun does on one or many. No torch.

Unlike torchrun's, the store through which the ranks find one another listens on the loopback alone, and an error stays
the one line that rank 0 prints.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from megalora.cluster.environment import LISTENS, NPROC, check_launcher
from megalora.errors import UserError

_PATIENCE = 30.0  # seconds that the others have to end by themselves once a rank has failed
_LAST_WORDS = 10.0  # seconds between asking a rank to end and ending it


def run_here(processes: int, words: Sequence[str], *, interactive: bool = False) -> int:
    """Run `megalora WORDS` on `processes` ranks of this host, and return the exit status: that of the first to fail.

    interactive  rank 0 reads the terminal, so the ranks stay in its process group, where Ctrl-C reaches them by itself
    Raises UserError where a launcher (torchrun, mpirun, srun) has started this process as one of several.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise UserError(
            f"nproc {processes} starts processes of its own, but a launcher has started this one already",
            "leave nproc out under torchrun, or start without torchrun",
        )
    check_launcher()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "megalora", *words],
                env=_environment(rank, processes, listener),
                stdin=None if rank == 0 and interactive else subprocess.DEVNULL,
                pass_fds=(listener.fileno(),) if rank == 0 else (),
                start_new_session=not interactive,
            )
            for rank in range(processes)
        ]
    with _signals_passed_on(ranks, interactive):
        try:
            return _wait(ranks)
        finally:
            _end(ranks)


def _environment(rank: int, processes: int, listener: socket.socket) -> Mapping[str, str]:
    """Return what torchrun sets, and the interfaces of one host."""
    found = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": listener.getsockname()[1],
        NPROC: processes,
    }
    if rank == 0:
        found[LISTENS] = listener.fileno()
    defaults = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}
    if sys.platform == "linux":
        defaults |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {**defaults, **os.environ, **{name: str(value) for name, value in found.items()}}


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    """Wait until all have ended, or some time after the first has failed; return the status of that one."""
    first, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if not first:
            failed = [(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode]
            if failed:
                first, deadline = _status(*failed[0]), time.monotonic() + _PATIENCE
        time.sleep(0.05)
    if not first:
        first = next((_status(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode), 0)
    return first


def _status(rank: int, code: int) -> int:
    """Return the exit status for a rank's return code, and say where a signal ended it: it has said nothing itself."""
    if code >= 0:
        return code
    print(f"megalora: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
    return 128 - code


def _end(ranks: Sequence[subprocess.Popen]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _LAST_WORDS
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)


@contextmanager
def _signals_passed_on(ranks: Sequence[subprocess.Popen], interactive: bool) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    handlers = {number: pass_on for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    if interactive:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal gives it to all of the group
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
