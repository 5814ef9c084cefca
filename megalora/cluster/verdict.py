"""From what the ranks last said of themselves to who is to blame: plain data, no threads, no clock of its own."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

DONE, STOPPED, FAILED, LOST = "done", "stopped", "failed", "lost"
ALIVE = "RSDI"  # states of a process, as in /proc/PID/stat; T is stopped
GONE = "gone"
_LATE = 5.0  # seconds that ranks which stop by themselves may be apart


@dataclass(frozen=True)
class Member:
    """A rank's process: `started` and `pid_space` tell it from another of the same number."""

    rank: int
    host: str
    pid: int
    started: str = ""
    pid_space: str = ""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself once in a while.

    number    counts its beats; progress counts what it has done
    at        where it stands, in words
    in_steps  it is past its start-up
    left      DONE, STOPPED, FAILED or LOST once it is leaving, and `why`; for LOST also `culprits`
    processes state of the processes of other ranks on its host, or GONE, by rank
    stack     where its main thread stands, once a hang is looked into
    """

    number: int
    progress: int
    at: str
    in_steps: bool = False
    left: str | None = None
    why: str = ""
    culprits: Sequence[int] = ()
    processes: Mapping[int, str] = field(default_factory=dict)
    stack: Sequence[str] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Beat:
        fields = json.loads(text)
        return cls(**fields | {"processes": {int(rank): state for rank, state in fields["processes"].items()}})


@dataclass(frozen=True)
class Verdict:
    """Why the run is over: one line, and the ranks that are to blame. cut_off: this host hears of no other."""

    text: str
    culprits: Collection[int]
    cut_off: bool = False


class Table:
    """The last beat of every rank, and for how long nothing has changed. Times are seconds of one monotonic clock."""

    def __init__(self, members: Sequence[Member], rank: int, now: float):
        self.members, self.rank = {member.rank: member for member in members}, rank
        self.beats = {member.rank: Beat(-1, 0, "start-up") for member in members}
        self.answered = self.moved = now  # the store; any rank's progress
        self.changed = dict.fromkeys(self.members, now)
        self.left_at: dict[int, float] = {}
        self._gone_at: dict[int, float] = {}

    def update(self, beats: Mapping[int, Beat], now: float) -> None:
        """Take in what the store holds."""
        self.answered = now
        for rank, beat in beats.items():
            if beat.number != self.beats[rank].number:
                self.changed[rank] = now
            if beat.progress != self.beats[rank].progress:
                self.moved = now
            if beat.left is not None:
                self.left_at.setdefault(rank, now)
            self.beats[rank] = beat

    def beside(self, processes: Mapping[int, str], now: float) -> None:
        """Take in the states of the processes on this host, which are seen without the store."""
        self.beats[self.rank] = replace(self.beats[self.rank], processes=processes)
        for rank, state in processes.items():
            if state == GONE:
                self._gone_at.setdefault(rank, now)

    def forgive(self, seconds: float) -> None:
        """Note that this process itself has not run for so long: nobody else is to blame for that time."""
        self.answered, self.moved = self.answered + seconds, self.moved + seconds
        self.changed = {rank: time + seconds for rank, time in self.changed.items()}

    def judge(self, now: float, heartbeat_timeout: float, *, broken: bool = False) -> Verdict | None:
        """Return who has ended the run, or None while all is well.

        broken  a connection of this rank has broken: silence counts sooner
        """
        by_word = self._left_by_their_word(now)
        if by_word is not None:
            return by_word
        patience = min(heartbeat_timeout, 2 * _LATE) if broken else heartbeat_timeout
        states = self._states(patience)
        gone = sorted(rank for rank, state in states.items() if state == GONE and self._has_died(rank, now))
        if gone:
            return Verdict(f"{self.where(gone[0])} has died, last heard of in {self.beats[gone[0]].at}", gone)
        if now - self.answered > patience:
            return self._silent_store(now)
        # Up to the last answer of the store: while that is silent, nobody can be heard of.
        silent = [
            rank
            for rank, changed in self.changed.items()
            if self.answered - changed > patience and self._counts(rank) and states.get(rank, "?") not in ALIVE
        ]
        return self._silent(silent, now) if silent else None

    def hung(self, now: float, answered: Collection[int]) -> Verdict:
        """Return the verdict where nobody makes progress; `answered` are the ranks that still say where they stand."""
        since = f"no progress for {now - self.moved:.0f} s"
        mute = [rank for rank in self.members if rank not in answered and self._counts(rank)]
        if mute:
            who = ", ".join(f"{self.where(rank)}{self._stopped(rank)}" for rank in mute[:4])
            more = f" and {len(mute) - 4} more" if len(mute) > 4 else ""
            verb = "does not answer" if len(mute) == 1 else "do not answer"
            return Verdict(f"{since}: {who}{more} {verb}, last seen in {self.beats[mute[0]].at}", mute)
        busy = [rank for rank in self.members if "communication" not in self.beats[rank].at]
        if busy and len(busy) < len(self.members):
            who = f"{self.where(busy[0])} is in {self.beats[busy[0]].at}, the others wait for it"
            return Verdict(f"{since}: {who}" if len(busy) == 1 else f"{since}: ranks {_numbers(busy)} do not wait", ())
        return Verdict(f"{since}: every rank answers, {self.where(0)} from {self.beats[0].at}", ())

    def lines(self) -> list[str]:
        """Return where every rank stands, and its stack where it was asked for."""
        found = []
        for rank, beat in self.beats.items():
            found.append(f"{self.where(rank)}{self._stopped(rank)}: {beat.at}")
            found += [f"    {line}" for line in beat.stack]
        return found

    def speaker(self, verdict: Verdict) -> int:
        """Return the one rank that tells the user: the lowest that this one can count on to live."""
        here = self.members[self.rank].host
        living = [
            rank
            for rank, member in self.members.items()
            if rank not in verdict.culprits and (member.host == here or not verdict.cut_off)
        ]
        return min(living, default=self.rank)

    def where(self, rank: int) -> str:
        return f"rank {rank} on {self.members[rank].host}"

    # ---- the parts of a judgement

    def _left_by_their_word(self, now: float) -> Verdict | None:
        for rank, beat in self.beats.items():
            if beat.left == LOST and rank != self.rank:
                return Verdict(beat.why, beat.culprits)
        for rank, beat in self.beats.items():
            late = beat.left == STOPPED and now - self.left_at[rank] > _LATE
            if rank != self.rank and (beat.left == FAILED or late):
                return Verdict(f"{self.where(rank)} {beat.left} in {beat.at}: {beat.why}", [rank])
        return None

    def _silent_store(self, now: float) -> Verdict:
        """Return the store is where rank 0 is, in its process or in its torchrun."""
        host, ranks = self.members[0].host, self._ranks_of(self.members[0].host)
        if host == self.members[self.rank].host:
            text = f"the store of the run, on this host ({host}), has not answered for {now - self.answered:.0f} s"
            return Verdict(f"{text}; rank 0 was in {self.beats[0].at}", [0] if self.rank else [])
        return replace(self._silent(ranks, now, now - self.answered), cut_off=True)

    def _silent(self, ranks: Sequence[int], now: float, seconds: float | None = None) -> Verdict:
        first = ranks[0]
        seconds = now - min(self.changed[rank] for rank in ranks) if seconds is None else seconds
        host, here = self.members[first].host, self.members[self.rank].host
        whole = host != here and all(rank in ranks or not self._counts(rank) for rank in self._ranks_of(host))
        if whole:
            there = self._ranks_of(host)
            what = f"{host} (rank{'s' * (len(there) > 1)} {_numbers(there)}) has not been heard of for {seconds:.0f} s"
            text = f"{what}: it or the link to it is down; rank {first} was in {self.beats[first].at}"
        else:
            text = f"{self.where(first)}{self._stopped(first)} has not been heard of for {seconds:.0f} s, "
            text += f"in {self.beats[first].at}"
        return Verdict(text, list(ranks))

    def _counts(self, rank: int) -> bool:
        """Return whether silence of this rank is news."""
        return rank != self.rank and self.beats[rank].left is None

    def _has_died(self, rank: int, now: float) -> bool:
        """Return whether it has died: not while a word of farewell may still lie in the store, unread."""
        seen = self._gone_at.get(rank, now - _LATE)
        return self._counts(rank) and (self.answered > seen or now - seen >= _LATE)

    def _states(self, patience: float) -> dict[int, str]:
        """Return state of each process that a rank beside it, itself heard of lately, still sees; GONE wins."""
        states: dict[int, str] = {}
        for witness, beat in self.beats.items():
            if witness != self.rank and self.answered - self.changed[witness] > patience / 2:
                continue
            for rank, state in beat.processes.items():
                if states.get(rank) != GONE:
                    states[rank] = state
        return states

    def _stopped(self, rank: int) -> str:
        seen = [beat.processes[rank] for beat in self.beats.values() if rank in beat.processes]
        return " (its process is stopped)" if {"T", "t"} & {*seen} else ""

    def _ranks_of(self, host: str) -> list[int]:
        return [rank for rank, member in self.members.items() if member.host == host]


def _numbers(ranks: Sequence[int]) -> str:
    """Join numbers: 0, 1, 2, 5 become 0-2, 5"""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
