"""The best checkpoint and early stopping, through runs whose evaluation losses are made up."""

import math
import shutil
from unittest import mock

import pytest
import tiny
from tiny import metrics, tune

from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import read_adapter
from megalora.monitor.evaluations import Evaluations
from megalora.training import Trainer

LOSSES = [3.0, 2.0, 2.5, 2.0, 1.0]
FLAGS = {"eval_fraction": 0.25, "eval_steps": 2, "save_steps": 3, "max_steps": 10, "save_total_limit": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs, folder, losses=LOSSES, **flags):
    """A run whose evaluations give `losses` one after another."""
    measured = [([loss], 1) for loss in losses]  # sums, and the labels that they are of
    with mock.patch.object(Trainer, "measure", mock.Mock(side_effect=measured)) as evaluate:
        (done,) = tune(1, inputs.flags(folder, **FLAGS | flags))
    return done, evaluate.call_count


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("iter_*"))


def same(folder, step):
    """Whether the export is the adapter of that step."""
    exported = tiny.exported(folder)
    adapter = read_adapter(folder / f"checkpoints/iter_{step:07d}").tensors
    return all((adapter[name.removeprefix("base_model.model.")] == value).all() for name, value in exported.items())


def test_the_best_is_counted_from_the_history():
    made = Evaluations([(2, 3.0), (4, 2.0), (6, math.nan), (8, 2.0)])
    assert made.best == (4, 2.0) and made.since_best == 2
    assert made.exhausted(2) and not made.exhausted(3) and not made.exhausted(None)
    assert made.add(10, 1.0) and not made.exhausted(1)
    assert not Evaluations([(1, math.inf)]).best


def test_a_run_stops_early_and_exports_the_best(inputs, tmp_path):
    """And where it is started again, it is done."""
    folder = tmp_path / "run"
    done, evaluations = run(inputs, folder, keep_best=True, early_stopping_patience=2)
    assert evaluations == 4 and metrics(folder)[-1]["step"] == 8
    assert "stopped early: no lower evaluation loss in the last 2 evaluations; the lowest is 2.0000" in done.out
    assert checkpoints(folder) == ["iter_0000004", "iter_0000008"], "the newest, and the best"
    assert same(folder, 4) and not same(folder, 8)
    assert f"--resume_peft_from_checkpoint {folder}" in done.out.splitlines()[-2], "the command that tries it"
    found = open_adapter(folder)
    assert found.where.endswith("iter_0000004"), "the result of a run is what it exported"
    assert "has the lowest evaluation loss of the run, and is taken; the newest" in found.notes[0]
    shutil.rmtree(folder / "peft")
    done, evaluations = run(inputs, folder, [], keep_best=True, early_stopping_patience=2)
    assert "stopped early" in done.out and evaluations == 0
    assert same(folder, 4)


def test_a_resumed_run_remembers_the_best(inputs, tmp_path):
    folder = tmp_path / "run"
    run(inputs, folder, keep_best=True, max_steps=6)
    shutil.rmtree(folder / "peft")
    done, evaluations = run(inputs, folder, LOSSES[3:], keep_best=True, lr_scheduler_type="constant")
    assert evaluations == 2 and "continuing after step 6" in done.out
    assert open_adapter(folder).where.endswith("iter_0000010") and not open_adapter(folder).notes
    assert checkpoints(folder) == ["iter_0000010"], "the last is the best"
    assert same(folder, 10)
