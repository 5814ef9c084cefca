"""Two hosts joined by a cable: pulled out in a step, both sides end soon and say why; plugged in, the run goes on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import tiny
import two_hosts
from test_failures import FLAGS, ROOT, Running, same_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hosts():
    reason = two_hosts.why_not()
    if reason:
        pytest.skip(f"NO TEST OF TWO HOSTS HAS RUN: {reason}")
    with two_hosts.TwoHosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def start(hosts: two_hosts.TwoHosts, number: int, folder: Path, flags: list[str]) -> Running:
    environment = {
        **{"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": two_hosts.ADDRESSES[0], "MASTER_PORT": "29511"},
        **{"GPUS_PER_NODE": "1", "MAX_RESTARTS": "0", "PREFLIGHT": "0", "PYTHON": sys.executable},
        **{"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": ""},
    }
    folder.mkdir(exist_ok=True)
    command = hosts.on(number, ["bash", ROOT / "scripts/slurm/run.sh", *flags])
    return Running(folder, *command, output_dir=folder.parent / "run", **environment)


def test_the_link_goes_down_in_a_step(hosts, inputs, tmp_path):
    whole = tmp_path / "whole"
    tiny.tune(2, inputs.flags(whole, **FLAGS))
    flags = inputs.flags(tmp_path / "run", **FLAGS, heartbeat_timeout=8)
    with start(hosts, 0, tmp_path / "a", flags) as first, start(hosts, 1, tmp_path / "b", flags) as second:
        first.until_step(15)
        hosts.link(up=False)
        both = {name: run.until_it_ends() for name, run in (("a", first), ("b", second))}
    assert 0 not in both.values(), (first.errors, second.errors)
    pattern = r"megalora: {} \(ranks? {}\) has not been heard of for \d+ s: it or the link to it is down; rank {} was"
    assert re.search("^" + pattern.format("hostb", 1, 1), first.errors, re.MULTILINE), first.errors
    assert re.search(r"^\[hostb, rank 1\] " + pattern.format("hosta", 0, 0), second.errors, re.MULTILINE), second.errors
    assert "tensor parallelism crosses hosts (hosta and hostb)" in (tmp_path / "a/out0").read_text()

    hosts.link(up=True)
    with start(hosts, 0, tmp_path / "a", flags) as first, start(hosts, 1, tmp_path / "b", flags) as second:
        assert (first.until_it_ends(), second.until_it_ends()) == (0, 0), (first.errors, second.errors)
    same_run(tmp_path / "run", whole)
