"""scripts/slurm in a real Slurm of two nodes on this machine: every way to start gives the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import slurm_cluster
import tiny
from tiny import column, exported
from waiting import until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
RUN, GENERATE = ROOT / "scripts/slurm/run.sh", ROOT / "scripts/slurm/gen.sh"
FLAGS = {"max_steps": 20, "save_steps": 8, "tensor_parallel_size": 2, "gradient_accumulation_steps": 1}
LONG = FLAGS | {"max_steps": 100, "save_steps": 40}  # a signal comes in time
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PREFLIGHT": "0"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = slurm_cluster.why_not()
    if reason:
        pytest.skip(f"NO SLURM TEST HAS RUN: {reason}")
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        (cluster.folder / "bin").mkdir()
        (cluster.folder / "bin/yhrun").symlink_to(_srun(cluster))
        cluster.environment |= ENVIRONMENT
        cluster.environment["PATH"] += f":{cluster.folder}/bin"
        yield cluster


def _srun(cluster: slurm_cluster.Cluster) -> str:
    return cluster.run("sh", "-c", "command -v srun").stdout.strip()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def same_run(inputs, tmp_path_factory):
    """same_run(folder, flags): the losses and the adapter are, to the last bit, those of four processes of one host.

    Which torchrun gives too (tests/test_failures.py).
    """
    wholes: dict[int, Path] = {}

    def check(folder: Path, flags: dict) -> None:
        steps = flags["max_steps"]
        if steps not in wholes:
            wholes[steps] = tmp_path_factory.mktemp("whole") / "run"
            tiny.tune(4, inputs.flags(wholes[steps], **flags))
        assert column(folder, "step") == [*range(1, steps + 1)]
        assert column(folder, "loss") == column(wholes[steps], "loss")
        assert tiny.largest_difference(exported(folder), exported(wholes[steps])) == 0

    return check


START = {
    "one task a rank, by yhrun": (["yhrun", "-p", "P", "-N", "2", "-n", "4"], {}),  # another name of srun
    "one task a node": (["srun", "-p", "P", "-N", "2", "-n", "2"], {"GPUS_PER_NODE": "2"}),
}


@pytest.mark.parametrize("mode", START)
def test_the_ways_to_start_are_one_job(cluster, inputs, same_run, tmp_path, mode):
    launcher, environment = START[mode]
    flags = inputs.flags(tmp_path / "run", **FLAGS | {"tensor_parallel_size": None})
    done = cluster.run(*launcher, "bash", RUN, *flags, environment=environment | {"TP": "2"})
    same_run(tmp_path / "run", FLAGS)
    assert done.stdout.count("4 = tensor 2 x pipeline 1 x data 2") == 1, "one job of four processes"
    for choice in ("MASTER_ADDR=n1 (first of n1 n2)", "GLOO_SOCKET_IFNAME=lo (", "--tensor_parallel_size 2 (from TP)"):
        assert done.stderr.count(choice) == 1, done.stderr


def test_a_batch_job_is_preempted_and_comes_back(cluster, inputs, same_run, tmp_path):
    """From its spool folder; SIGUSR1 in the middle. Then gen.sh replies with the adapter."""
    run = tmp_path / "run"
    job = cluster.submit("-N2", "-n4", RUN, *inputs.flags(run, **LONG))
    metrics = run / "metrics.jsonl"
    until("a step", lambda: metrics.exists() and '"step": 2,' in metrics.read_text())
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(job, ("PENDING",))
    cluster.until_idle()
    assert 2 <= len(column(run, "step")) < LONG["max_steps"]
    (saved,) = (run / "checkpoints").glob(f"iter_{column(run, 'step')[-1]:07d}")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")  # else Slurm waits two minutes
    done = cluster.wait(job)
    assert done["Restarts"] == "1"
    log = Path(done["StdOut"]).read_text()
    assert log.count(f"megalora: stopped by SIGUSR1 after step {int(saved.name[5:])} of 100") == 1, log
    assert f"continuing after step {int(saved.name[5:])}" in log
    same_run(run, LONG)

    words = ["--model_path", inputs.model, "--resume_peft_from_checkpoint", run]
    words += ["--prompt", "Who are you? 3", "--max_new_tokens", "8"]
    here, there = tmp_path / "here.jsonl", tmp_path / "slurm.jsonl"
    cluster.run("python", ROOT / "tools/generate.py", *words, "--output_file", here)
    cluster.run("srun", "-N2", "-n4", "bash", GENERATE, *words, "--output_file", there, "--tensor_parallel_size", "2")
    assert here.read_text() == there.read_text() != ""


@pytest.mark.parametrize("mode", [*START, "batch job"])
def test_the_demo_model_trains_and_replies(cluster, request, tmp_path, tmp_path_factory, mode):
    """Minutes: pytest tests/test_slurm.py -k demo --demo_model models/SmolLM2-135M-Instruct"""
    model = request.config.getoption("--demo_model")
    if model is None:
        pytest.skip("THE DEMO'S MODEL HAS NOT RUN IN A SLURM: --demo_model names it (make demo gets it)")
    inputs = tiny.Inputs(
        model.resolve(), ROOT / "examples/data/self_cognition.json", ROOT / "examples/lora_config.json"
    )
    flags = {"seq_length": 256, "max_steps": 3, "pipeline_parallel_size": 2, "gradient_accumulation_steps": 2}
    here = tmp_path_factory.getbasetemp() / "demo"
    words = ["--prompt", "Who are you?", "--max_new_tokens", "8", "--model_path", inputs.model]
    if not here.exists():  # the first of the modes
        here.mkdir()
        done = tiny.torchrun(here, 4, *inputs.flags(here / "run", **flags))
        assert done.returncode == 0, done.stderr
        there = ["--resume_peft_from_checkpoint", here / "run", "--output_file", here / "replies.jsonl"]
        cluster.run("python", ROOT / "tools/generate.py", *words, *there)

    run, replies = tmp_path / "run", tmp_path / "replies.jsonl"
    words += ["--resume_peft_from_checkpoint", run, "--output_file", replies, "--pipeline_parallel_size", "2"]
    if mode == "batch job":
        cluster.wait(cluster.submit("-N2", "-n4", RUN, *inputs.flags(run, **flags)))
        cluster.wait(cluster.submit("-N2", "-n4", GENERATE, *words))
    else:
        launcher, environment = START[mode]
        cluster.run(*launcher, "bash", RUN, *inputs.flags(run, **flags), environment=environment)
        cluster.run(*launcher, "bash", GENERATE, *words, environment=environment)
    assert column(run, "loss") == column(here / "run", "loss")
    assert replies.read_text() == (here / "replies.jsonl").read_text() != ""
