"""What scripts/slurm decide from the environment, without a Slurm: stubs stand for the programs they call."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts/slurm"
SHOWN = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK NNODES MASTER_ADDR MASTER_PORT OMP_NUM_THREADS \
OPENBLAS_NUM_THREADS NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_HCA MEGALORA_IN_STEP"
SHOW = f"""for name in {SHOWN}; do if [ -n "${{!name:-}}" ]; then echo "$name=${{!name}}"; fi; done
printf '%s\\n' "$@" | sed 's/^/word /'"""
STUBS = {
    "python": f"""if [[ $1 == */tools/doctor.py ]] && [ -n "${{SICK:-}}" ]; then echo "disk FAULT, $*"; exit 4; fi
{SHOW}""",
    "srun": SHOW + "\nexit ${STEP_STATUS:-0}",
    "scontrol": """case "$*" in
"show hostnames n[1-3]") printf 'n1\\nn2\\nn3\\n' ;;
"show job 70") echo "JobState=${JOB_STATE:-RUNNING} Requeue=1 BatchFlag=1"; echo "   Command=$COMMAND_WAS --flag" ;;
"requeue 70") echo REQUEUED ;;
*) exit 9 ;;
esac""",
    "nvidia-smi": 'for ((i = 0; i < ${GPUS:-0}; i++)); do echo "GPU $i: a GPU"; done',
    "ip": """case "$*" in *addr*) ;; *) echo "10.0.0.2 via 10.0.0.1 dev eth7 src 10.0.0.3 uid 0" ;; esac""",
    "getent": 'echo "10.0.0.2 STREAM $2"',
}
BATCH = {"SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NNODES": "3", "SLURM_NODEID": "0"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "1(x3)", "SLURM_PROCID": "0"}
STEP |= {"SLURM_LOCALID": "0", "SLURM_CPUS_ON_NODE": "16"}
TASKS = STEP | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "3(x2),2"}


@pytest.fixture
def start(tmp_path):
    """start(environment, *flags, script=...) -> (what the started program was given, lines of the script)"""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    def start(environment, *flags, script=SCRIPTS / "run.sh", status=0):
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        kept |= {"PATH": f"{folder}:/usr/bin:/bin", "PYTHON": str(folder / "python"), "PREFLIGHT": "0"}
        done = subprocess.run(
            ["bash", str(script), *flags], env=kept | environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == status, done.stderr
        lines = done.stdout.splitlines()
        given = dict(line.split("=", 1) for line in lines if not line.startswith("word ") and "=" in line)
        return given, [line.removeprefix("word ") for line in lines if line.startswith("word ")], done

    return start


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_one_task_a_rank(start):
    """Ranks go node by node, however Slurm has numbered the tasks."""
    given, words, _ = start(TASKS | {"SLURM_NODEID": "1", "SLURM_LOCALID": "2", "SLURM_PROCID": "7"}, "--a", "b c")
    assert words == [str(ROOT / "tools/finetune.py"), "--a", "b c"]
    assert given | {"MASTER_PORT": ""} == {
        **{"RANK": "5", "LOCAL_RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "3", "NODE_RANK": "1"},
        **{"NNODES": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "", "OMP_NUM_THREADS": "5"},
        **{"OPENBLAS_NUM_THREADS": "5", "NCCL_SOCKET_IFNAME": "eth7", "GLOO_SOCKET_IFNAME": "eth7"},
    }
    assert 15000 <= int(given["MASTER_PORT"]) < 30000
    assert start(TASKS | {"SLURM_JOB_ID": "70"})[0]["MASTER_PORT"] == given["MASTER_PORT"], "all tasks find it alone"


def test_one_task_a_node(start):
    """torchrun inside, once a node."""
    given, words, done = start(STEP | {"GPUS": "4", "SLURM_NODEID": "2", "SLURM_PROCID": "2"}, "--a", "b")
    assert "RANK" not in given and given["OMP_NUM_THREADS"] == "4"
    assert words[-3:] == [str(ROOT / "tools/finetune.py"), "--a", "b"]
    assert option(words, "--nnodes") == "3" and option(words, "--nproc_per_node") == "4"
    assert option(words, "--rdzv_endpoint") == f"n1:{given['MASTER_PORT']}"
    assert option(words, "--rdzv_conf") == "is_host=0" and option(words, "--max_restarts") == "3"
    assert done.stderr == "", "the first node's task speaks for all"
    for environment, processes in (
        ({"GPUS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8", "GPUS": "4"}, "2"),
        ({"SLURM_GPUS_ON_NODE": "8", "GPUS": "4"}, "8"),
        ({"SLURM_GPUS_PER_NODE": "a100:6", "GPUS": "4"}, "6"),
        ({}, "1"),
    ):
        assert option(start(STEP | environment)[1], "--nproc_per_node") == processes, environment
    _, _, done = start(STEP | {"GPUS_PER_NODE": "four"}, status=2)
    assert done.stderr.endswith("run.sh: error: GPUS_PER_NODE=four is not a number of processes\n")


def test_a_batch_script_starts_itself_once_as_a_step(start, tmp_path):
    """Also from the copy in Slurm's spool folder."""
    copy = tmp_path / "slurm_script"
    shutil.copy(SCRIPTS / "run.sh", copy)
    for script in (SCRIPTS / "run.sh", copy):
        environment = BATCH | {"COMMAND_WAS": str(SCRIPTS / "run.sh"), "SLURM_CPUS_PER_TASK": "7"}
        given, words, _ = start(environment, "--a", "b c", script=script)
        assert words[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=7"]
        assert words[2:] == ["bash", str(SCRIPTS / "run.sh"), "--a", "b c"] and given["MEGALORA_IN_STEP"] == "1"


def test_a_preempted_batch_job_is_requeued(start):
    """But not one that the user has cancelled, nor one that failed."""
    for status, state, requeued in ((75, "RUNNING", True), (75, "CANCELLED", False), (1, "RUNNING", False)):
        _, _, done = start(BATCH | {"STEP_STATUS": str(status), "JOB_STATE": state}, status=status)
        assert ("REQUEUED" in done.stdout) == requeued, (status, state)


def test_what_is_set_stays(start):
    choices = {
        "MASTER_ADDR": "10.1.1.1",
        "MASTER_PORT": "4000",
        "OMP_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "2",
        "NCCL_SOCKET_IFNAME": "ib4",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "mlx5_2",
    }
    given, _, done = start(TASKS | choices | {"SLURM_NODEID": "0"})
    assert given.items() >= choices.items()
    for line in ("NCCL_IB_HCA=mlx5_2 (as set)", "OMP_NUM_THREADS=3 (as set)", "GLOO_SOCKET_IFNAME=eth0 (as set)"):
        assert line in done.stderr


def test_every_choice_is_printed_once_with_its_reason(start):
    _, _, done = start(TASKS)
    lines = done.stderr.splitlines()
    assert all(line.startswith("run.sh: ") for line in lines)
    for text in ("eth7 (no ib0 that is up; the route to n3)", "MASTER_ADDR=n1 (first of n1 n2 n3)", "left to NCCL"):
        assert sum(text in line for line in lines) == 1, done.stderr
    assert start(TASKS | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"})[2].stderr == ""


def test_the_layout_comes_from_flags_before_the_environment(start):
    assert start(TASKS | {"TP": "2", "PP": "4"})[1][1:] == [
        "--tensor_parallel_size", "2", "--pipeline_parallel_size", "4",
    ]  # fmt: skip
    for flag in (["--tensor-parallel-size", "1"], ["--tensor_parallel_size=1"]):
        _, words, done = start(TASKS | {"TP": "2"}, *flag)
        assert words[1:] == flag and "TP=2 is not used" in done.stderr


def test_gpus_bound_to_tasks(start):
    """Where Slurm shows each task its own GPU alone, that GPU is number 0 in each."""
    bound = {"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "2", "SLURM_LOCALID": "2"}
    given, _, _ = start(TASKS | bound)
    assert (given["LOCAL_RANK"], given["LOCAL_WORLD_SIZE"], given["RANK"]) == ("0", "1", "2")
    given, _, _ = start(TASKS | bound | {"CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert (given["LOCAL_RANK"], given["LOCAL_WORLD_SIZE"]) == ("2", "3")


def test_without_slurm(start):
    _, words, _ = start({"GPUS": "2"}, "--a", "b")
    alone = ["-m", "megalora.cluster.local", "--max_restarts", "3", "--nproc", "2"]  # which listens on the loopback
    assert words == [*alone, str(ROOT / "tools/finetune.py"), "--a", "b"]
    one = STEP | {"SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1", "GPUS_PER_NODE": "2"}
    assert start(one)[1][:6] == alone
    several = {"NNODES": "2", "NODE_RANK": "1", "GPUS_PER_NODE": "4"}
    assert "set MASTER_ADDR" in start(several, status=2)[2].stderr
    _, words, _ = start(several | {"MASTER_ADDR": "h1"})
    assert option(words, "--rdzv_endpoint") == "h1:29500" and option(words, "--rdzv_conf") == "is_host=0"
    assert option(words, "--local_addr") == "10.0.0.3"


def test_generation_is_started_in_the_same_ways(start):
    _, words, _ = start(TASKS, "--prompt", "Who?", script=SCRIPTS / "gen.sh")
    assert words == [str(ROOT / "tools/generate.py"), "--prompt", "Who?"]
    _, words, _ = start(STEP, script=SCRIPTS / "gen.sh")
    assert option(words, "--nnodes") == "3" and words[-1] == str(ROOT / "tools/generate.py")


def test_the_doctor_comes_first_once_a_node(start, tmp_path):
    flags = ["--a", "b", "--output-dir", "the out"]
    _, words, done = start(TASKS | {"PREFLIGHT": "1"}, *flags)
    assert words == [str(ROOT / "tools/finetune.py"), *flags] and "doctor: no fault on this node" in done.stderr
    _, _, done = start(TASKS | {"PREFLIGHT": "1", "SICK": "1"}, *flags, status=2)
    assert "disk FAULT, " in done.stderr and "--output_dir the out" in done.stderr and done.stdout == ""
    file = tmp_path / "run.yaml"
    file.write_text("seq_length: 8\noutput_dir: '/of the/file'  # here\n")
    _, _, done = start(TASKS | {"PREFLIGHT": "1", "SICK": "1"}, str(file), "--a", "b", status=2)
    assert "--output_dir /of the/file" in done.stderr.splitlines()[-2], done.stderr
    _, _, done = start(TASKS | {"PREFLIGHT": "1", "SICK": "1", "TMPDIR": str(tmp_path)}, "--a", "b", status=2)
    assert f"--output_dir {tmp_path}" in done.stderr, "one that is not known is not looked at"
    other_task = {"PREFLIGHT": "1", "SICK": "1", "SLURM_LOCALID": "1", "SLURM_PROCID": "1"}
    assert start(TASKS | other_task, *flags)[1][0] == str(ROOT / "tools/finetune.py")
    _, words, _ = start(TASKS | {"PREFLIGHT": "1"}, "--tensor_parallel_size", "2", script=SCRIPTS / "doctor.sh")
    assert words == [str(ROOT / "tools/doctor.py"), "--tensor_parallel_size", "2"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
def test_shellcheck():
    files = sorted(str(file.relative_to(ROOT)) for file in SCRIPTS.glob("*.sh"))
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("has_torch", [True, False])
def test_an_active_environment_without_torch_gives_way_to_the_projects_own(start, tmp_path, has_torch):
    """A conda base is active in many shells."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    own = copy / ".venv/bin/python"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/bash\necho own=1\n")
    own.chmod(0o755)
    active = tmp_path / "conda/bin/python"
    active.parent.mkdir(parents=True)
    active.write_text(f"#!/bin/bash\nif [ \"$1\" = -c ]; then exit {int(not has_torch)}; fi\necho active=1\n")
    active.chmod(0o755)
    path = f"{active.parent}:{tmp_path / 'bin'}:/usr/bin:/bin"
    environment = {"PYTHON": "", "CONDA_PREFIX": str(active.parents[1]), "PATH": path}
    given, _, done = start(environment, script=copy / "scripts/slurm/run.sh")
    assert given == ({"active": "1"} if has_torch else {"own": "1"}), done.stderr
    assert ("lacks torch or transformers: .venv is used" in done.stderr) is not has_torch
