"""A run whose saves fail: every rank stops after the same step with one clear line, and goes on from before."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import tiny
from spawn import spawn
from tiny import column, exported, largest_difference, metrics, tune
from told import user_error

from megalora import saving
from megalora.checkpoint.run.folder import claim
from megalora.checkpoint.run.state import newest_sound, verified
from megalora.monitor.metrics import JsonLines
from megalora.training import Trainer

STEPS = 60
FLAGS = {"max_steps": STEPS, "save_steps": 5, "gradient_accumulation_steps": 2, "logging_steps": 1}
TP2 = {"tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def no_room(rank: int, world_size: int, command: list[str], step: int) -> list[tiny.Done]:
    """The checkpoint of `step` finds no room on rank 1; its threads end when training is two steps further."""
    save, train, further = saving.save_adapter, Trainer.step, threading.Event()

    def written(folder: Path, *arguments: object) -> Path:
        if folder.name == f"iter_{step:07d}.tmp":
            assert further.wait(60), "training goes on meanwhile"
            if rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        return save(folder, *arguments)

    def trained(self, number, data, **options):
        result = train(self, number, data, **options)
        if number + 1 == step + 2:
            further.set()
            for thread in threading.enumerate():
                if thread.name == f"save of step {step}":
                    thread.join()
        return result

    with mock.patch.object(saving, "save_adapter", written), mock.patch.object(Trainer, "step", trained):
        return tiny.run(rank, world_size, [command])


def test_a_save_that_fails_on_one_rank_stops_all_after_the_next_step(inputs, tmp_path):
    run = tmp_path / "run"
    (first,), (second,) = spawn(no_room, 2, inputs.flags(run, **FLAGS, **TP2), 10)
    assert (first.status, second.status, second.err) == (2, 2, ""), (first, second)
    line = user_error(first.err)
    assert "iter_0000010: cannot be written (No space left on device): free space" in line
    assert column(run, "step")[-1] == 12, "it was noticed in step 12, and step 13 told all"
    assert f"checkpoint {run / 'checkpoints/iter_0000005'}: complete in " in first.out
    saved, complaints = newest_sound(run)
    assert (saved.step, complaints) == (5, []) and not list(run.glob("checkpoints/*.tmp"))
    (done,) = tune(2, inputs.flags(run, **FLAGS | {"max_steps": 15}, **TP2))
    assert "continuing after step 5" in done.out and column(run, "step") == [*range(1, 16)]


# ---- disks that are really full, and folders that really cannot be written


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a file system in memory, or the same one with other options; a skip without the right."""
    folder, mounted = tmp_path / "disk", []

    def mount(options: str) -> Path:
        folder.mkdir(exist_ok=True)
        words = ["-o", f"remount,{options}" if mounted else options]
        done = subprocess.run(["mount", "-t", "tmpfs", *words, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(options)
        return folder

    if sys.platform != "linux" or os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(inputs, tmp_path, disk):
    """Room for one checkpoint: the second finds none, the first stays, and with more room the run goes on from it."""
    whole, flags = tmp_path / "whole", FLAGS | {"max_steps": 12, "logging_steps": 6, "save_total_limit": 3}
    tune(2, inputs.flags(whole, **flags, **TP2))
    room = sum(-(-file.stat().st_size // 4096) * 4 for file in newest_sound(whole)[0].folder.rglob("*.pt"))
    run = disk(f"size={2 * room + 4}k") / "run"
    command = inputs.flags(run, **flags, **TP2)
    (first,), (second,) = spawn(tiny.run, 2, [command])
    assert (first.status, second.status, second.err) == (2, 2, ""), (first, second)
    line = user_error(first.err)
    assert "iter_0000010: cannot be written (No space left on device): free space" in line
    assert newest_sound(run)[0].step == 5 and not list(run.glob("checkpoints/*.tmp"))
    disk("size=64m")
    (done,) = tune(2, command)
    assert "continuing after step 5" in done.out
    for name in ("loss", "grad_norm", "tokens"):
        assert column(run, name) == column(whole, name)
    assert largest_difference(exported(run), exported(whole)) == 0


def test_checkpoints_that_cannot_be_written_stop_the_run_before_its_first_step(inputs, disk):
    folder = disk("size=8m")
    (folder / "run/checkpoints").mkdir(parents=True)
    disk("ro")
    other = folder.with_name("other")
    other.mkdir()
    claim(other)
    (other / "checkpoints/.probe").mkdir(parents=True)
    commands = [inputs.flags(folder / "run", **FLAGS, **TP2), inputs.flags(other, **FLAGS, **TP2)]
    first, second = spawn(tiny.run, 2, commands)
    said = (f"log_dir {folder / 'run/logs'} (in output_dir", "checkpoints cannot be written to")
    for done, what in zip(first, said, strict=True):
        line = user_error(done.err)
        assert done.status == 2 and what in line, line
    assert "Read-only file system" in first[0].err and "Is a directory" in first[1].err
    assert [(done.status, done.err) for done in second] == [(2, "")] * 2
    assert metrics(other) == []


# ---- the log


def full_log(rank: int, world_size: int, command: list[str], step: int) -> list[tiny.Done]:
    write = JsonLines.write

    def full(self, record):
        if record["step"] == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, record)

    with mock.patch.object(JsonLines, "write", full):
        return tiny.run(rank, world_size, [command])


def test_a_log_that_cannot_be_written_stops_all(inputs, tmp_path):
    run = tmp_path / "run"
    (first,), (second,) = spawn(full_log, 2, inputs.flags(run, **FLAGS, **TP2), 7)
    assert (first.status, second.status, second.err) == (2, 2, ""), (first, second)
    line = user_error(first.err)
    assert "step 7 cannot be logged (No space left on device): free space" in line
    assert column(run, "step")[-1] == 6 and newest_sound(run)[0].step == 5


def test_tokens_are_counted_over_a_stop_between_two_lines(inputs, tmp_path):
    """metrics.jsonl of a run that stopped after step 4, where lines are written every 3 steps."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = FLAGS | {"save_steps": 4, "logging_steps": 3, "lr_scheduler_type": "constant"}
    tune(1, inputs.flags(whole, **flags | {"max_steps": 6}))
    tune(1, inputs.flags(parts, **flags | {"max_steps": 6}))
    shutil.rmtree(parts / "checkpoints/iter_0000006")
    (done,) = tune(1, inputs.flags(parts, **flags | {"max_steps": 6}))
    assert "continuing after step 4" in done.out
    assert column(parts, "tokens") == column(whole, "tokens") and len(metrics(whole)) == 2
    verified(parts / "checkpoints/iter_0000006")
