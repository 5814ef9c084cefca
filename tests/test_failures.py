"""A rank that dies, one that stops, a signal to leave: the run ends soon, says why, and goes on bit for bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from tiny import column, exported
from waiting import until

ROOT = tiny.ROOT
STEPS = 60
FLAGS = {"max_steps": STEPS, "save_steps": 10, "tensor_parallel_size": 2}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks' processes as Linux shows them"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The run that nothing befalls."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    tiny.tune(2, inputs.flags(folder, **FLAGS))
    return folder


class Running:
    """A command under way, with the files that its output goes to."""

    def __init__(self, folder: Path, *command: object, output_dir: Path | None = None, **environment: str):
        self.output_dir, self.folder = output_dir or folder / "run", folder
        self._count = len(list(folder.glob("err*")))
        with open(folder / f"out{self._count}", "wb") as out, open(folder / f"err{self._count}", "wb") as err:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdout=out, stderr=err, cwd=folder,
                env=os.environ | ENVIRONMENT | environment,
            )  # fmt: skip

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in range(2):
            self.signal(rank, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    @property
    def errors(self) -> str:
        return (self.folder / f"err{self._count}").read_text(errors="replace")

    def until(self, what: str, holds: Callable[[], bool]) -> None:
        until(what, holds, told=lambda: self.errors)

    def until_step(self, step: int) -> None:
        metrics = self.output_dir / "metrics.jsonl"
        self.until(f"step {step}", lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())

    def until_it_ends(self) -> int:
        self.until("the end", lambda: self.process.poll() is not None)
        return self.process.returncode

    def signal(self, rank: int, number: int) -> None:
        log = self.output_dir / f"logs/rank_{rank:05d}.log"
        if log.exists():
            process = int(re.findall(r"---- rank \d+ on \S+, process (\d+)", log.read_text())[-1])
            try:
                os.kill(process, number)
            except ProcessLookupError:
                pass


def torchrun(*options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]
    return [*launcher, str(ROOT / "tools/finetune.py")]


def same_run(folder: Path, whole: Path, steps: int = STEPS) -> None:
    assert column(folder, "step") == [*range(1, steps + 1)]
    assert column(folder, "loss") == column(whole, "loss")
    assert tiny.largest_difference(exported(folder), exported(whole)) == 0


def test_a_killed_rank_and_the_restart_by_torchrun(inputs, whole, tmp_path):
    """Unattended; and --overwrite_output_dir does not undo what the run itself has made."""
    flags = inputs.flags(tmp_path / "run", **FLAGS, overwrite_output_dir=True)
    with Running(tmp_path, *torchrun("--max_restarts", "3"), *flags) as run:
        run.until_step(15)
        run.signal(1, signal.SIGKILL)
        assert run.until_it_ends() == 0, run.errors
    lines = [line for line in run.errors.splitlines() if line.startswith("megalora: ")]
    (line,) = lines
    assert re.match(r"megalora: rank 1 on \S+ has died, last heard of in step \d+.*; the run ends here", line)
    same_run(tmp_path / "run", whole)
    assert "continuing after step" in (tmp_path / "out0").read_text()
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert log.count("---- rank 0 on ") == 2 and "rank 1 on " in log and "in step" in log and "File " in log


def test_a_rank_lost_in_the_ring(inputs, tmp_path):
    """Of context parallelism: one line says which, and the same flags go on from the checkpoint, bit for bit."""
    ring = {"max_steps": 40, "save_steps": 10, "context_parallel_size": 2}
    tiny.tune(2, inputs.flags(tmp_path / "whole", **ring))
    with Running(tmp_path, *torchrun(), *inputs.flags(tmp_path / "run", **ring)) as run:
        run.until_step(15)
        run.signal(1, signal.SIGKILL)
        assert run.until_it_ends() != 0
    (line,) = [line for line in run.errors.splitlines() if line.startswith("megalora: ")]
    assert re.match(
        r"megalora: rank 1 on \S+ has died, last heard of in (step \d+.*|start-up); the run ends here", line
    )
    tiny.tune(2, inputs.flags(tmp_path / "run", **ring))
    same_run(tmp_path / "run", tmp_path / "whole", 40)


def test_a_stopped_rank_is_named_by_the_others(inputs, tmp_path):
    """With where every rank stands."""
    flags = inputs.flags(tmp_path / "run", **FLAGS | {"max_steps": 10**5}, hang_timeout=3)
    with Running(tmp_path, *torchrun(), *flags) as run:
        run.until_step(10)
        run.signal(1, signal.SIGSTOP)
        stopped = time.monotonic()
        run.until("the verdict", lambda: "the run ends here" in run.errors)
        seconds = time.monotonic() - stopped
        run.signal(1, signal.SIGKILL)
        assert run.until_it_ends() != 0
    assert seconds < 30, "sooner than without hang_timeout"
    pattern = (
        r"megalora: no progress for \d+ s: rank 1 on \S+ \(its process is stopped\) does not answer, last seen in st"
    )
    assert re.search(pattern, run.errors), run.errors
    assert re.search(r"^rank 0 on \S+: step \d+, (communication|checkpoint)", run.errors, re.MULTILINE), run.errors
    assert "collectives.py" in run.errors, "and its stack"


def test_a_signal_to_leave(inputs, whole, tmp_path):
    """By run.sh: the step is finished and saved; the same flags go on, bit for bit."""
    command = ["bash", ROOT / "scripts/slurm/run.sh", *inputs.flags(tmp_path / "run", **FLAGS)]
    environment = {"GPUS_PER_NODE": "2", "PREFLIGHT": "0", "PYTHON": sys.executable}
    with Running(tmp_path, *command, **environment) as run:
        run.until_step(15)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.until_it_ends() == 75, run.errors
    assert re.search(rf"^megalora: stopped by SIG\w+ after step \d+ of {STEPS}, saved in ", run.errors, re.MULTILINE)
    assert (tmp_path / "run/peft/adapter_model.safetensors").exists()
    tiny.tune(2, inputs.flags(tmp_path / "run", **FLAGS))
    same_run(tmp_path / "run", whole)
