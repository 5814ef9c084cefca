"""Each fault is found, in the table, by its host or link; and what would stop a run gives a status that is not 0."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_hosts
from waiting import PATIENCE

from megalora import cli, doctor
from megalora.flags import DoctorArguments
from megalora.ops import extension

ROOT = Path(__file__).resolve().parents[1]


def rows(text: str, check: str) -> list[str]:
    return [line for line in text.splitlines() if f" {check} " in line]


def test_a_sound_machine(tmp_path, capsys):
    assert cli.main(["doctor", "--output_dir", str(tmp_path / "out"), "--free_space", "0"]) == 0
    out = capsys.readouterr().out
    for check in ("versions", "extension", "GPUs", "interface", "InfiniBand", "disk"):
        assert len(rows(out, check)) >= 1, out
    assert "doctor: 0 faults" in out


def test_an_unbuilt_extension(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(extension, "has_kernels", lambda device: False)
    assert doctor.doctor(DoctorArguments(output_dir=str(tmp_path), free_space=0))
    (row,) = rows(capsys.readouterr().out, "extension")
    assert "warning" in row and "make install" in row


def test_a_gpu_with_little_shared_memory(monkeypatch):
    for name, answer in (("has_kernels", True), ("fits_gpu", False), ("swiglu", None), ("_gpu_name", "RTX")):
        target = extension if name == "has_kernels" else doctor
        monkeypatch.setattr(target, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(doctor.torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(doctor.torch.cuda, "synchronize", lambda device: None)
    found = doctor._extension(torch.device("cuda", 0))
    assert found.state == doctor.WARNING and "shared memory than a RTX has: plain torch" in found.text


def test_a_missing_interface(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    assert cli.main(["doctor", "--output_dir", str(tmp_path)]) == cli.FAULTS
    (row,) = rows(capsys.readouterr().out, "interface")
    assert "FAULT" in row and "GLOO_SOCKET_IFNAME=ib7: this host has no such interface" in row


def test_too_little_space(tmp_path):
    finding = doctor.disk(str(tmp_path), needed=1e9)
    assert finding.state == doctor.FAULT and "GiB free" in finding.text and "less than 1e+09" in finding.text


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        finding = doctor.disk(str(tmp_path), needed=0)
        assert finding.state == doctor.FAULT and "No space left" in finding.text
        assert list(tmp_path.iterdir()) == [], "it leaves nothing"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("sockets", "hosts", "state", "words"),
    [
        ([], 1, doctor.OK, "nothing: other machines reach none of it"),
        ([("127.0.0.1", 29500), ("::1", 7)], 1, doctor.OK, "127.0.0.1:29500, [::1]:7: other machines reach none"),
        ([("0.0.0.0", 29500)], 1, doctor.WARNING, "0.0.0.0:29500: whoever reaches these ports can disturb the run"),
        ([("::", 29500)], 1, doctor.WARNING, "start with megalora COMMAND --nproc N"),
        ([("10.0.0.1", 29500)], 2, doctor.OK, "10.0.0.1:29500: only the hosts of the run should reach these ports"),
    ],
)
def test_what_listens_where(monkeypatch, sockets, hosts, state, words):
    monkeypatch.setattr(doctor, "listening", lambda processes: sockets)
    found = doctor._listening(hosts)
    assert (found.check, found.state) == ("listens", state) and words in found.text


def test_examples_listen_on_the_loopback():
    scripts = sorted((ROOT / "examples").glob("*.sh"))
    assert scripts and not [file for file in scripts if "torchrun" in file.read_text()]
    for file in scripts:
        starts = [line for line in file.read_text().splitlines() if "megalora finetune" in line]
        assert all("--nproc" in line for line in starts), file


def link(ranks, inside, bandwidth, latency=1e-5):
    return doctor.MeasuredLink("pp", ranks, f"rank {ranks[0]} - rank {ranks[1]}", inside, latency, bandwidth)


def test_slow_links_are_named():
    good = [link((n, n + 1), True, 10e9) for n in range(4)] + [link((n, n + 4), False, 1e9) for n in range(3)]
    assert [one.state for one in doctor.judge_links(good)] == ["ok", "ok"]
    for slow in (link((4, 5), True, 1e9), link((3, 7), False, 0.2e9), link((3, 7), False, 1e9, latency=0.1)):
        (found,) = [one for one in doctor.judge_links([*good, slow]) if one.state == "warning"]
        assert found.check == "pp link" and found.text.startswith(slow.between)
    (alone,) = doctor.judge_links([link((0, 1), False, 1e6)])
    assert alone.state == "warning", "nothing to compare it with"


def test_a_bandwidth_that_cannot_be_measured_is_no_number():
    """A message that takes no longer than an empty one would be infinitely fast."""
    empty, full = [1.0e-3, 1.1e-3, 0.9e-3], [3.0e-3, 3.1e-3, 2.9e-3]
    assert doctor.bandwidth(empty, full, 1 << 20) == pytest.approx((1 << 20) / 2e-3)
    assert doctor.bandwidth(empty, [1.0e-3, 9e-3, 0.5e-3], 1 << 20) is None
    assert doctor.bandwidth(empty, [0.8e-3] * 3, 1 << 20) is None
    good, unknown = link((0, 1), False, 1e9), link((1, 2), False, None)
    (warned, ok) = doctor.judge_links([good, unknown])
    assert (warned.state, ok.state) == ("warning", "ok") and "bandwidth not measurable" in warned.text


def test_the_code_version_follows_the_files():
    assert doctor.code_version() == doctor.code_version() and "files " in doctor.code_version()


@pytest.mark.slow
def test_two_hosts(tmp_path):
    """Another commit on the second host, and a link of 10 Mbit/s to it: both named."""
    reason = two_hosts.why_not()
    if reason:
        pytest.skip(f"NO TEST OF TWO HOSTS HAS RUN: {reason}")
    other = tmp_path / "other"
    shutil.copytree(ROOT / "megalora", other / "megalora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tools", other / "tools")
    with (other / "megalora/batch.py").open("a") as file:
        file.write("# another commit\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with two_hosts.TwoHosts() as hosts:
        try:
            hosts.shape("tbf", "rate", "10mbit", "burst", "16kb", "latency", "200ms")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"NO SLOW LINK HAS BEEN TRIED: {error.stderr}")
        processes = []
        for number, tree in enumerate((ROOT, other)):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", number]
            launcher += ["--master_addr", two_hosts.ADDRESSES[0], "--master_port", "29517", "--nproc_per_node", "1"]
            command = [*launcher, tree / "tools/doctor.py", "--output_dir", tmp_path / "out", "--free_space", "0"]
            own = {"PYTHONPATH": str(tree), "GLOO_SOCKET_IFNAME": hosts.cables[number]}
            processes.append(
                subprocess.Popen(
                    hosts.on(number, command), cwd=tree, env=environment | own, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        try:
            (out, error), _ = [process.communicate(timeout=PATIENCE) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert all(process.returncode != 0 for process in processes), error
    text = " ".join(out.split())
    assert "same code FAULT hosta: " in text and "hostb: " in text and "bring all to one commit" in text, out
    assert "dp link warning rank 0 on hosta - rank 1 on hostb: 0.00 GB/s" in text, out
