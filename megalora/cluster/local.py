"""Starts a command on N processes of this host, as torchrun does on one or many. No torch.

    python -m megalora.cluster.local --nproc 8 --max_restarts 3 tools/finetune.py FLAGS     (scripts/slurm, on one host)

Unlike torchrun's, the store through which the ranks find one another listens on the loopback alone, and an error stays
the one line that rank 0 prints.
"""

from __future__ import annotations

import argparse
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
_NOT_AGAIN = (0, 2, 75, 130, 143)  # done, an error of the user, saved and asked to leave, and ended by a signal


def run_here(
    processes: int, words: Sequence[str], *, interactive: bool = False, program: Sequence[str] = ("-m", "megalora")
) -> int:
    """Run `megalora WORDS` on `processes` ranks of this host, and return the exit status: that of the first to fail.

    interactive  rank 0 reads the terminal, so the ranks stay in its process group, where Ctrl-C reaches them by itself
    program      what Python runs instead of megalora
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
                [sys.executable, *program, *words],
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


def run_again(processes: int, program: str, words: Sequence[str], restarts: int) -> int:
    """Run a program as `run_here`, and start it again where a rank has died, so many times; return the last status."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    for count in range(restarts + 1):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(count)  # torchrun's name for it
        status = run_here(processes, words, interactive=interactive, program=[program])
        if status in _NOT_AGAIN or count == restarts:
            break
        again = f"started again, {count + 1} of {restarts} times"
        print(f"megalora: the run ended with status {status}: {again}", file=sys.stderr, flush=True)
    return status


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
    while _some_run(ranks) and time.monotonic() < deadline:
        if not first:
            failed = [(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode]
            if failed:
                first, deadline = _status(*failed[0]), time.monotonic() + _PATIENCE
        time.sleep(0.05)
    if not first:
        first = next((_status(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode), 0)
    return first


def _some_run(ranks: Sequence[subprocess.Popen]) -> bool:
    """Return whether a rank still runs. Polls all of them: only that sets the return code of one that has ended."""
    return any([rank.poll() is None for rank in ranks])


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
        while _some_run(ranks) and time.monotonic() < deadline:
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


def main() -> int:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="start a program on processes of this host")
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--max_restarts", type=int, default=3)
    parser.add_argument("program")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    try:
        return run_again(given.nproc, given.program, given.words, given.max_restarts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
