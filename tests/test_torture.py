"""A run that is killed again and again ends as the run that never was: SIGKILL to any rank, at any moment.

The suite kills a few times. `make torture` kills 50 times and prints each one:

    pytest -s tests/test_torture.py --kills 50 --seed 7     # the same kills again (to the scheduler's whim)
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from spawn import SpawnError, spawn
from tiny import exported, metrics

from megalora import saving
from megalora.checkpoint.adapter import shards
from megalora.checkpoint.adapter.shards import read_adapter
from megalora.checkpoint.run.folder import checkpoints_folder
from megalora.checkpoint.run.state import newest_sound
from megalora.data import cache
from megalora.saving import RunSaver
from megalora.training import Trainer

RANKS, STEPS, SAVE_STEPS = 4, 40, 4
FLAGS = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "logging_steps": 3,
    "eval_steps": 10,
    "gradient_accumulation_steps": 2,
}
DIARY = "diary"  # beside the run: what rank 0 began, a line each
CACHE = "cache"  # beside the run: the tokens of its rows
EVENTS = {  # how often each is drawn, its largest count, and the most seconds behind it
    "start": (2, 1, 1.5),
    "cache": (2, 3, 0.01),
    "step": (6, 14, 0.03),
    "save": (6, 3, 0.15),
    "disk": (6, 60, 0.0),
    "export": (2, 2, 0.02),
}


@dataclass(frozen=True)
class Kill:
    """Which rank, and when: `seconds` after the `count`-th event of its life."""

    rank: int
    event: str  # "start" of the process, a part of the "cache" of tokens, a "step", a "save", a "disk" operation of a
    # save, an "export" (of rank 0)
    count: int
    seconds: float
    grace: float  # seconds that the other ranks have before they are killed too

    @classmethod
    def draw(cls, source: random.Random) -> Kill:
        event = source.choices(list(EVENTS), [weight for weight, *_ in EVENTS.values()])[0]
        _, most, seconds = EVENTS[event]
        count, grace = source.randint(1, most), source.choice([0.0, 0.0, 0.2, 1.0])
        rank = 0 if event == "export" else source.randrange(RANKS)
        return cls(rank, event, count, source.uniform(0.0, seconds), grace)

    def __str__(self) -> str:
        return f"rank {self.rank}, {1e3 * self.seconds:5.1f} ms after {self.event} {self.count}, others +{self.grace} s"


class Killer:
    """A process that kills this one, so that no lock of the interpreter puts it off."""

    def __init__(self) -> None:
        ours, self._theirs = os.pipe()
        victim = os.getpid()
        if os.fork() == 0:
            os.close(self._theirs)
            while order := os.read(ours, 8):
                time.sleep(struct.unpack("d", order)[0])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            os._exit(0)
        os.close(ours)

    def kill_in(self, seconds: float) -> None:
        os.write(self._theirs, struct.pack("d", seconds))
        if not seconds:
            time.sleep(60)


class Life:
    """Counts the events of a rank, and has it killed at the one that is meant."""

    def __init__(self, kill: Kill | None):
        self._kill, self._seen = kill, 0
        self._killer = Killer() if kill else None

    def event(self, kind: str) -> None:
        if self._kill is not None and kind == self._kill.event:
            self._seen += 1
            if self._seen == self._kill.count:
                self._killer.kill_in(self._kill.seconds)

    def before(self, kind: str, function: Callable) -> Callable:
        """The function, with an event before it; "disk" ones only count in the thread of a save."""

        def counted(*arguments: object, **options: object) -> object:
            if kind != "disk" or threading.current_thread().name.startswith("save of"):
                self.event(kind)
            return function(*arguments, **options)

        return counted


def live(rank: int, world_size: int, command: list[str], kill: Kill | None) -> list[tiny.Done]:
    """The run on this rank, which is perhaps killed."""
    life = Life(kill if kill and kill.rank == rank else None)
    life.event("start")
    diary = Path(command[command.index("--output_dir") + 1]).with_name(DIARY)

    def note(text: str) -> None:
        if rank == 0:
            with diary.open("a") as file:
                file.write(f"{text}\n")

    step, save, write = Trainer.step, RunSaver.save, shards.save_tensors

    def written(value: dict, stream: object) -> None:
        """On a slow disk: training has changed the state meanwhile."""
        time.sleep(random.Random(f"{rank} {value['trainer']['step']}").uniform(0.0, 0.1))
        write(value, stream)

    def stepped(self: Trainer, number: int, data: object, **options: object) -> object:
        note(f"step {number + 1}")
        life.event("step")
        return step(self, number, data, **options)

    def saved(self: RunSaver, number: int, numbers: object) -> Path:
        self.settle()
        note(f"save {number}")  # so those before it are complete
        life.event("save")
        return save(self, number, numbers)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(shards, "save_tensors", written))
        patches.enter_context(mock.patch.object(Trainer, "step", stepped))
        patches.enter_context(mock.patch.object(RunSaver, "save", saved))
        for owner, name in [(cache, "verified"), (cache.Writer, "add"), (cache.Writer, "finish"), (cache, "_put")]:
            patches.enter_context(mock.patch.object(owner, name, life.before("cache", getattr(owner, name))))
        for name in ("read_adapter", "write_peft"):
            patches.enter_context(mock.patch.object(saving, name, life.before("export", getattr(saving, name))))
        writes = (os, "fsync"), (os, "replace"), (shards, "save_tensors")
        for owner, name in [*writes, (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")]:
            patches.enter_context(mock.patch.object(owner, name, life.before("disk", getattr(owner, name))))
        return tiny.run(rank, world_size, [command])


def result(run: Path) -> dict[str, object]:
    """All that a run is judged by."""
    read = read_adapter(checkpoints_folder(run) / f"iter_{STEPS:07d}")
    clock = ("tokens_per_second", "tflops")
    return {
        "adapters": read.tensors,
        "moments": {f"{name} {key}": m for name, both in read.optimizer.items() for key, m in both.items()},
        "trainer": read.trainer,
        "peft": exported(run),
        "metrics": [{k: v for k, v in line.items() if k not in clock} for line in metrics(run)],
        "evaluations": metrics(run, "eval_metrics.jsonl"),
        "checkpoints": sorted(child.name for child in checkpoints_folder(run).iterdir()),
    }


def assert_same(ours: dict[str, object], theirs: dict[str, object]) -> None:
    for name, value in theirs.items():
        if name in ("adapters", "moments", "peft"):
            assert ours[name].keys() == value.keys() and value, name
            different = [key for key in value if not torch.equal(ours[name][key], value[key])]
            assert not different, f"{name}: {different}"
        else:
            assert ours[name] == value, name


class Runs:
    """Runs that are killed until they are complete, one after another; every death is looked into."""

    def __init__(self, inputs: tiny.Inputs, folder: Path, whole: dict[str, object], source: random.Random):
        self._inputs, self._folder, self._whole, self._source = inputs, folder, whole, source
        self.kills = self.in_saves = self.complete = self.most_lost = 0
        self.events: Counter[str] = Counter()

    def run(self, kills: int) -> None:
        while self.kills < kills:
            self._folder.mkdir()
            while not self._live(Kill.draw(self._source) if self.kills < kills else None):
                pass
            assert_same(result(self._folder / "run"), self._whole)
            self.complete += 1
            shutil.rmtree(self._folder)
        print(
            f"{self.kills} kills ({self.in_saves} with a save under way, {self.events['cache']} of the tokens being "
            f"cached, {self.events['export']} of the export) in {self.complete} runs of {STEPS} steps, all "
            f"complete and bit-identical; at most {self.most_lost} steps done again (a checkpoint every {SAVE_STEPS})"
        )

    def _live(self, kill: Kill | None) -> bool:
        """One life; whether it completed the run."""
        run = self._folder / "run"
        before, _ = newest_sound(run)
        (self._folder / DIARY).write_text("")
        flags = {"data_cache": self._folder / CACHE, "eval_data_path": self._inputs.data}
        command = self._inputs.flags(run, **FLAGS, **flags)
        if kill is not None and kill.event == "cache":
            shutil.rmtree(self._folder / CACHE, ignore_errors=True)
        try:
            spawn(live, RANKS, command, kill, grace=kill.grace if kill else 0.0)
        except SpawnError as error:
            assert kill is not None and f"rank {kill.rank} of {RANKS}" in str(error), error
            assert f"exit status -{signal.SIGKILL:d}" in str(error), error
        else:
            return True
        self.kills += 1
        self.events[kill.event] += 1
        steps, saves = self._diary()
        saved, complaints = newest_sound(run)
        self._judge(kill, before, saved, complaints, steps, saves)
        return False

    def _diary(self) -> tuple[list[int], list[int]]:
        words = [line.split() for line in (self._folder / DIARY).read_text().splitlines()]
        return tuple([int(number) for kind, number in words if kind == which] for which in ("step", "save"))

    def _judge(self, kill, before, saved, complaints, steps, saves) -> None:
        """What a death may leave: the newest complete save is there, and nothing that looks like one is damaged."""
        found, old = (0 if s is None else s.step for s in (saved, before))
        done = max([old, *(step - 1 for step in steps)])  # the last one was begun
        under_way = bool(saves) and found < saves[-1]
        complete = max([old, *(saves[:-1])])  # the next save waits for the one before
        print(f"kill {self.kills}: {kill}: after step {done}, a checkpoint of step {found}"
              f"{f', that of {saves[-1]} was under way' if under_way else ''}")  # fmt: skip
        self.in_saves += under_way
        self.most_lost = max(self.most_lost, done - found)
        assert steps[:1] in ([], [old + 1]), "a life begins after the newest sound checkpoint"
        assert found >= complete, f"the checkpoint of step {complete} was complete"
        assert all("latest_checkpointed_iteration.txt" in line for line in complaints), complaints


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tiny.Inputs:
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def test_killed_at_any_moment(inputs: tiny.Inputs, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    kills, seed = pytestconfig.getoption("kills"), pytestconfig.getoption("seed")
    print(f"\nseed {seed}")
    spawn(live, RANKS, inputs.flags(tmp_path / "whole", **FLAGS, eval_data_path=inputs.data), None)
    Runs(inputs, tmp_path / "killed", result(tmp_path / "whole"), random.Random(seed)).run(kills)
