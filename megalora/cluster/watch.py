"""Signs of life between ranks, outside the collectives: who has died, who hangs, and where everyone stands.

Each rank has two threads. One tells the store, a connection of its own, where this rank stands, and reads what the
others said. The other judges: it needs no answer from anyone, so a lost link or a stopped process does not stop it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from megalora.cluster.verdict import DONE, FAILED, GONE, LOST, STOPPED, Beat, Member, Table, Verdict
from megalora.errors import Leaving, RankLost, UserError
from megalora.parallel.collectives import gather_objects
from megalora.parallel.mesh import Axis, Clock

_LOOK = 0.5  # seconds between two judgements
_GRACE = 3.0  # seconds that the main thread has, after the verdict, to leave by itself
_ANSWERS = 3.0  # seconds that the ranks have to say where they stand in a hang
_SLEPT = 5.0  # seconds between two judgements from which on this process must have been stopped itself
_PREFIX = "megalora/beat/"


class Position:
    """Where this rank stands: the step, the phases it is in, and how often it has entered each in this step."""

    def __init__(self) -> None:
        self.progress = 0
        self.in_steps = False
        self._step = 0
        self._phases: list[str] = []
        self._entered: dict[str, int] = {}

    def step(self, number: int) -> None:
        """Note the step that begins, counted from 0."""
        self.progress += 1
        self.in_steps, self._step, self._entered = True, number, {}

    def enter(self, phase: str) -> None:
        self.progress += 1
        self._phases.append(phase)
        self._entered[phase] = self._entered.get(phase, 0) + 1

    def leave(self) -> None:
        self.progress += 1
        if self._phases:
            self._phases.pop()

    def __str__(self) -> str:
        """Return, say, "step 7, communication in forward 3": the third forward of the step."""
        phases = [*self._phases]
        words = [f"{phase} {self._entered.get(phase, 0)}" if phase in _COUNTED else phase for phase in phases]
        where = f"step {self._step + 1}" if self.in_steps else "start-up"
        return f"{where}, {' in '.join(reversed(words))}" if words else where


_COUNTED = ("forward", "backward")  # one for each microbatch


class Watch:
    """Watches over a run from this rank. It is the run's clock too: phases go through it on to `clock`.

    heartbeat_timeout  seconds after which a rank that says nothing is taken for dead
    hang_timeout       seconds without progress of any rank, in the steps, after which the run is ended; 0: never
    """

    def __init__(self, clock: Clock | None = None, *, heartbeat_timeout: float = 30.0, hang_timeout: float = 0.0):
        self._clock, self._heartbeat_timeout, self._hang_timeout = clock, heartbeat_timeout, hang_timeout
        self._log: Callable[[str], None] = lambda text: None
        self._say: Callable[[str], None] = self._print
        self._traces: TextIO | None = None
        self._position = Position()
        self._store: dist.Store | None = None
        self._table: Table | None = None
        self._beat, self._lock = Beat(0, 0, "start-up"), threading.Lock()
        self._end, self._wake, self._told = threading.Event(), threading.Event(), threading.Event()
        self._decided, self._unwound = threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._broken = False
        self._asked_at: float | None = None  # when the ranks were asked for their stacks
        self._stack: tuple[str, ...] = ()
        self._threads: list[threading.Thread] = []

    # ---- what the run tells it

    def __call__(self, phase: str) -> _Phase:
        """Return a context that counts as `phase`: its name in the beats, and its time for `clock`."""
        return _Phase(self._position, phase, None if self._clock is None else self._clock(phase))

    def step(self, number: int) -> None:
        """Note that a step begins, counted from 0."""
        self._position.step(number)

    def tell(self, log: Callable[[str], None], say: Callable[[str], None], traces: TextIO) -> None:
        """Send details from now on to `log`, stacks of all threads to `traces`, and to `say` what the user must see."""
        self._log, self._say, self._traces = log, say, traces

    def begin(self, store: dist.Store | None, world: Axis) -> None:
        """Start watching. Collective. store: for this watch alone; None for a world of one."""
        members = gather_objects(_this_process(world.rank), world)
        self._store, self._table = store, Table(members, world.rank, time.monotonic())
        # Of n ranks each reads n beats: together they ask the store for a bounded number a second.
        self._interval = max(0.5, world.size / 64)
        if store is not None:
            self._exchange()
            self._threads.append(threading.Thread(target=self._tell, name="heartbeat", daemon=True))
        self._threads.append(threading.Thread(target=self._watch, name="watch", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def hosts(self) -> list[str]:
        """Where each rank runs, by rank."""
        assert self._table is not None, "begin() first"
        return [member.host for member in self._table.members.values()]

    def done(self) -> None:
        """Say that this rank leaves in good order; that it falls silent is no news."""
        self._leave(DONE, "")

    def explain(self, error: BaseException) -> None:
        """Tell the others why this rank leaves. Raises RankLost where `error` is only the end of another one."""
        if self._table is None or self._beat.left in (DONE, STOPPED, FAILED):
            return
        if isinstance(error, (UserError, Leaving, KeyboardInterrupt)):
            self._leave(STOPPED, _first_line(error))
            return
        if _is_broken_connection(error):
            self._broken = True
            self._decided.wait(min(self._heartbeat_timeout, 10.0) + 5.0)
        if self._verdict is not None:
            raise RankLost(self._verdict.text) from error
        self._leave(FAILED, _first_line(error))

    def end(self, in_order: bool) -> None:
        """Stop the threads. Where a verdict has been found it does not return: the process ends."""
        self._unwound.set()
        if self._verdict is not None and not in_order:
            self._threads[-1].join()
        self._end.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(1.0)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.explain(error)

    def _leave(self, how: str, why: str) -> None:
        self._mark(left=how, why=why)
        if self._store is not None and self._threads:
            self._told.clear()
            self._wake.set()
            self._told.wait(2.0)

    # ---- the thread that tells and reads

    def _tell(self) -> None:
        while not self._end.is_set():
            self._wake.wait(self._interval)
            self._wake.clear()
            try:
                self._exchange()
            except (RuntimeError, ValueError):
                self._broken = True  # the store has gone, and with it rank 0 or its torchrun; for how long counts
                self._end.wait(self._interval)

    def _exchange(self) -> None:
        table = self._table
        assert self._store is not None and table is not None
        first = self._beat.number == 0
        self._mark()
        self._store.set(f"{_PREFIX}{table.rank}", self._beat.to_json())
        self._told.set()
        if first:  # not all have said anything yet
            ready = [rank for rank in table.members if self._store.check([f"{_PREFIX}{rank}"])]
        else:
            ready = [*table.members]
        values = self._store.multi_get([f"{_PREFIX}{rank}" for rank in ready])
        beats = {rank: Beat.from_json(value.decode()) for rank, value in zip(ready, values, strict=True)}
        table.update(beats, time.monotonic())

    def _mark(self, **changes: Any) -> None:
        """Send a new beat: as the last one in what is not said anew."""
        with self._lock:
            self._beat = replace(
                self._beat,
                number=self._beat.number + 1,
                progress=self._position.progress,
                # Where it stood when it left: what unwinds after that is no news.
                at=str(self._position) if self._beat.left is None else self._beat.at,
                in_steps=self._position.in_steps,
                processes=self._processes(),
                stack=self._stack,
                **changes,
            )

    def _processes(self) -> dict[int, str]:
        table = self._table
        if table is None or not Path("/proc/self/stat").exists():
            return {}
        me = table.members[table.rank]
        beside = [one for one in table.members.values() if (one.host, one.pid_space) == (me.host, me.pid_space)]
        return {one.rank: _state(one) for one in beside if one.rank != me.rank}

    # ---- the thread that judges

    def _watch(self) -> None:
        table, last = self._table, time.monotonic()
        assert table is not None
        while not self._end.wait(_LOOK):
            now = time.monotonic()
            if now - last > _SLEPT:
                table.forgive(now - last)
            last = now
            if self._store is None:
                self._mark()
                table.update({table.rank: self._beat}, now)
                verdict = None
            else:
                table.beside(self._processes(), now)
                verdict = table.judge(now, self._heartbeat_timeout, broken=self._broken)
            verdict = verdict or self._judge_hang(now)
            if verdict is not None:
                self._decide(verdict)
                return

    def _judge_hang(self, now: float) -> Verdict | None:
        table = self._table
        asked = any(beat.stack for beat in table.beats.values())
        quiet = now - table.moved
        stuck = self._hang_timeout > 0 and self._position.in_steps and quiet > self._hang_timeout
        # The others may see it a little sooner. If it has gone on since, whoever asked was too hasty.
        in_doubt = quiet > self._hang_timeout / 2
        if self._asked_at is None:
            if stuck or (asked and in_doubt):
                self._asked_at, self._stack = now, _main_stack()
                self._wake.set()
            return None
        if not in_doubt:
            self._asked_at, self._stack = None, ()
            return None
        # A stack of before counts for nothing: a rank may have been asked once, gone on, and been stopped then.
        answered = {
            rank
            for rank, beat in table.beats.items()
            if (beat.stack and table.changed[rank] >= self._asked_at) or beat.left is not None or rank == table.rank
        }
        if len(answered) == len(table.members) or now - self._asked_at > _ANSWERS:
            return table.hung(now, answered)
        return None

    def _decide(self, verdict: Verdict) -> None:
        """Tell it, let the main thread close its files if it can, and end the process."""
        self._verdict = verdict
        self._leave_word(verdict)
        self._report(verdict)
        self._decided.set()
        self._unwound.wait(_GRACE)
        if verdict.cut_off:
            _end_torchrun()
        if not self._end.is_set():
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            # Not by an exception: the main thread may stand in a collective, and the interpreter's own end may abort.
            os._exit(RankLost.status)

    def _leave_word(self, verdict: Verdict) -> None:
        self._told.clear()
        self._mark(left=LOST, why=verdict.text, culprits=[*verdict.culprits])
        self._wake.set()
        self._told.wait(1.0)

    def _report(self, verdict: Verdict) -> None:
        table = self._table
        lines = table.lines()
        self._log("\n".join([verdict.text, "where the ranks stand:", *lines]))
        if self._traces is not None and not self._traces.closed:
            faulthandler.dump_traceback(self._traces, all_threads=True)
        if table.speaker(verdict) == table.rank:
            hang = self._asked_at is not None
            self._say("\n".join([f"megalora: {verdict.text}; the run ends here", *(lines if hang else [])]))

    def _print(self, text: str) -> None:
        table = self._table
        mark = "" if table.rank == 0 else f"[{table.members[table.rank].host}, rank {table.rank}] "
        print(mark + text, file=sys.stderr, flush=True)


class _Phase:
    __slots__ = ("_inner", "_phase", "_position")

    def __init__(self, position: Position, phase: str, inner: contextlib.AbstractContextManager | None):
        self._position, self._phase, self._inner = position, phase, inner

    def __enter__(self) -> None:
        self._position.enter(self._phase)
        if self._inner is not None:
            self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._inner is not None:
            self._inner.__exit__(*error)
        self._position.leave()


def host_name() -> str:
    """Return Slurm's name of this node, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _this_process(rank: int) -> Member:
    member = Member(rank, host_name(), os.getpid())
    try:
        space = os.readlink("/proc/self/ns/pid")
        return Member(rank, member.host, member.pid, _stat(member.pid)[1], space)
    except OSError:
        return member


def _stat(pid: int) -> tuple[str, str]:
    """Return (state, time of its start) of a process. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[0], fields[19]


def _state(member: Member) -> str:
    try:
        state, started = _stat(member.pid)
    except OSError:
        return GONE
    return GONE if started != member.started or state in "ZX" else state


def _main_stack() -> tuple[str, ...]:
    """Return the innermost calls of the main thread, innermost last."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    if frame is None:
        return ("(no main thread)",)
    calls = traceback.extract_stack(frame)[-8:]
    return tuple(f"{Path(call.filename).name}:{call.lineno} {call.name}: {call.line or ''}".strip() for call in calls)


def _is_broken_connection(error: BaseException) -> bool:
    """Return whether a collective failed because of another rank, or of the network, and not by itself."""
    text = str(error).lower()
    marks = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "gloo", "nccl")
    known = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(mark in text for mark in marks))


def _end_torchrun() -> None:
    """Cut off from its rendezvous torchrun can start nothing again, and waits for answers for minutes."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        if "TORCHELASTIC_RUN_ID" in os.environ and b"torch" in command:
            os.kill(parent, signal.SIGKILL)
    except OSError:
        pass  # another rank of this host has done it


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
