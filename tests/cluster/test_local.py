"""`--nproc`: processes of one host, their signals and their errors, and what listens meanwhile."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiny
from waiting import PATIENCE, until

from megalora import cli, commands
from megalora.cluster import local
from megalora.cluster.environment import check_launcher
from megalora.cluster.preemption import CTRL_C, MARK, Preemption
from megalora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def started(words: list[str]) -> subprocess.Popen:
    environment = CLEAN | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "megalora", "finetune", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def listening(processes: set[int]) -> list[str]:
    """The local addresses (hexadecimal, as the kernel has them) on which any of the processes listens."""
    sockets = set()
    for process in processes:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            try:
                sockets.update(re.findall(r"socket:\[(\d+)\]", os.readlink(entry)))
            except OSError:
                continue
    tables = [Path(f"/proc/net/{file}").read_text().splitlines()[1:] for file in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in sockets]


def children(parent: int) -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_saves_and_nothing_listens_outside_the_host(inputs, tmp_path):
    folder = tmp_path / "run"
    run = started(inputs.flags(folder, nproc=2, tensor_parallel_size=2, max_steps=100_000))
    metrics = folder / "metrics.jsonl"
    until("the first step", lambda: run.poll() is not None or (metrics.exists() and metrics.stat().st_size))
    assert run.poll() is None, run.stderr.read()
    ranks = children(run.pid)
    addresses = listening(ranks | {run.pid})
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=PATIENCE)
    assert len(ranks) == 2 and addresses and set(addresses) == {"0100007F"}, "127.0.0.1"
    assert run.returncode == 130, err
    assert "Ctrl-C again leaves at once" in err
    step = int(re.search(r"stopped by Ctrl-C after step (\d+) of 100000, saved in", err)[1])
    assert json.loads((folder / f"checkpoints/iter_{step:07d}/manifest.json").read_text())["step"] == step


def test_an_error_is_one_line(inputs, tmp_path):
    """That the ranks find, and that can be known before any is started."""
    run = started(inputs.flags(tmp_path / "run", nproc=2, tensor_parallel_size=2, lora_config=inputs.data))
    out, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 2 and err.count("error: ") == 1 and "Traceback" not in err, err
    with mock.patch.object(local.subprocess, "Popen", side_effect=AssertionError):
        words = inputs.flags(tmp_path / "run", nproc=2, tensor_parallel_size=3)
        assert cli.main(["finetune", *words]) == 2


def test_a_rank_that_is_killed_is_named(monkeypatch, capfd, tmp_path):
    script = tmp_path / "megalora.py"
    dies = "import os, time\nos.environ['RANK'] == '1' and os.kill(os.getpid(), 9)\n"
    script.write_text(f"{dies}time.sleep(60)\nopen('ended', 'w')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "_PATIENCE", 0.2)
    assert local.run_here(3, []) == 128 + 9
    assert capfd.readouterr().err == "megalora: rank 1 was ended by SIGKILL\n"
    assert not (tmp_path / "ended").exists(), "the others are ended, and not waited for"


def test_two_launchers_are_one_too_many(monkeypatch, inputs, tmp_path):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="nproc 2 starts processes of its own, but a launcher has started this one"):
        local.run_here(2, [])
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"mpirun has started 4 processes \(OMPI_COMM_WORLD_SIZE\).* --nproc"):
        check_launcher()
    with pytest.raises(UserError, match="mpirun has started 4 processes"):
        local.run_here(2, [])
    monkeypatch.setenv("RANK", "3")
    check_launcher()  # whoever sets both knows how


def test_python_has_no_command_line_to_start_again(inputs, tmp_path):
    from megalora.flags import parse_finetune

    arguments = parse_finetune(inputs.flags(tmp_path / "run", nproc=2))
    with pytest.raises(UserError, match="nproc 2 belongs to the command line"):
        commands.finetune(arguments)


def test_the_second_ctrl_c_leaves_at_once(monkeypatch, capsys):
    monkeypatch.delenv(MARK, raising=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
    with Preemption() as preemption:
        with pytest.raises(KeyboardInterrupt):  # before the steps nothing is worth saving
            signal.raise_signal(signal.SIGINT)
        preemption.steps()
        signal.raise_signal(signal.SIGINT)
        assert preemption.signal_name == CTRL_C
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # as it was before
        signal.raise_signal(signal.SIGINT)


def test_a_run_of_one_host_starts_again_where_a_rank_has_died(started_again):
    """By scripts/slurm: until it ends by itself, and not after an error that it would end with again."""
    died = "import os, sys; open('starts', 'a').write(os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
    found = started_again(died + "os.environ['TORCHELASTIC_RESTART_COUNT'] + os.environ['RANK'] == '01' and 1/0")
    assert found[:2] == (0, ["00", "01", "10", "11"]) and "status 1: started again, 1 of 2 times" in found[2]
    assert started_again(died + "sys.exit(3)")[:2] == (3, ["00", "01", "02", "10", "11", "12"])
    for status in (2, 75):
        assert started_again(died + f"sys.exit({status})")[:2] == (status, ["00", "10"])


@pytest.fixture
def started_again(tmp_path):
    """A program on two processes -> (status, rank and number of each start, what was said)."""

    def run(source):
        (tmp_path / "program.py").write_text(source)
        (tmp_path / "starts").write_text("")
        command = [sys.executable, "-m", "megalora.cluster.local", "--nproc", "2", "--max_restarts", "2", "program.py"]
        environment = CLEAN | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        text = (tmp_path / "starts").read_text()
        return done.returncode, sorted(text[at : at + 2] for at in range(0, len(text), 2)), done.stderr

    return run
