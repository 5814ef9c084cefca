"""A run whose saves fail: every rank stops after the same step with one clear line, and goes on from before."""

import errno
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import tiny
from spawn import spawn
from tiny import column, metrics, tune

from megalora import saving
from megalora.checkpoint.state import newest_sound, verified
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
    (line,) = first.err.splitlines()
    assert "iter_0000010: cannot be written (No space left on device): free space" in line
    assert column(run, "step")[-1] == 12, "it was noticed in step 12, and step 13 told all"
    assert f"checkpoint {run / 'checkpoints/iter_0000005'}: complete in " in first.out
    saved, complaints = newest_sound(run)
    assert (saved.step, complaints) == (5, []) and not list(run.glob("checkpoints/*.tmp"))
    (done,) = tune(2, inputs.flags(run, **FLAGS | {"max_steps": 15}, **TP2))
    assert "continuing after step 5" in done.out and column(run, "step") == [*range(1, 16)]


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
    (line,) = first.err.splitlines()
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
