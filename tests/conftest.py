"""What every test gets: one thread, no GPU unless it is marked gpu, the shared data folder where there is one, and
skips that say why."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from cpu_times import CpuTimes
from fuzz import EXAMPLES
from spawn import wait_for_no_disk

ROOT = Path(__file__).resolve().parents[1]
# Else each worker, and each program that tests start, compiles the package and the tests again: seconds each.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="tests/test_torture.py: times that a run is killed")
    parser.addoption("--questions", type=int, default=3, help="tests/test_generation_parity.py: how many are asked")
    parser.addoption("--seed", type=int, default=0, help="tests/test_torture.py: of the moments")
    parser.addoption("--cpu_times", type=Path, help="a file for the CPU seconds of each test (tests/cpu_times.py)")
    parser.addoption("--demo_model", type=Path, help="tests/test_slurm.py: the demo's model, to run it in a Slurm")


def pytest_configure(config: pytest.Config) -> None:
    # Several processes run at a time (xdist, spawn), and sums over more threads differ in the last bit.
    torch.set_num_threads(1)
    wait_for_no_disk()
    # A machine under load is slow, not wrong. The suite tries the same examples each time, so that no change fails by
    # chance in what it has not touched; `make fuzz` draws new ones.
    hypothesis.settings.register_profile("suite", deadline=None, derandomize=not EXAMPLES)
    hypothesis.settings.load_profile("suite")
    cache = tempfile.TemporaryDirectory(prefix="megalora-tests-")  # what commands keep for later runs
    os.environ["XDG_CACHE_HOME"] = cache.name
    os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
    # dtype auto is float32 on every machine, in what tests start too (megalora/compute_dtype.py).
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"
    config.add_cleanup(cache.cleanup)
    if config.option.cpu_times:
        config.pluginmanager.register(CpuTimes(config.option.cpu_times.absolute()))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what all tests share, half a million objects."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="GPU test: no CUDA device here"))
    lacked = getattr(sys.modules.get("oracle"), "LACKED", {})
    for item in items:
        family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
        if isinstance(family, str) and family in lacked:
            item.add_marker(pytest.mark.skip(reason=lacked[family]))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # quick ones first


def _seed(name: str) -> None:
    number = zlib.crc32(name.encode())
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def pytest_runtest_call(item: pytest.Item) -> None:
    """What a test draws without a seed of its own is the same whatever ran before it in this process."""
    _seed(item.nodeid)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """And so is what a fixture draws, whichever test is the first to ask for it."""
    _seed(fixturedef.argname)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is not marked gpu sees no GPU, neither here nor in what it starts: it is of CPUs on every machine."""
    if item.get_closest_marker("gpu"):
        return (yield)
    with (
        mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(torch.cuda, "device_count", lambda: 0),
        mock.patch.object(torch.cuda, "_cached_device_count", 0),  # parts of torch count by themselves, and remember
    ):
        return (yield)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared real input: MEGALORA_SHARED, or `shared` beside the repository, or a skip."""
    folder = Path(os.environ.get("MEGALORA_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is not a folder (MEGALORA_SHARED names another)")
    return folder
