"""dtype auto: bfloat16 on CPUs with AMX, the same on every rank, and a run keeps what it began with."""

from unittest import mock

import pytest
import torch
from spawn import spawn

from megalora.compute_dtype import choose_dtype, has_amx, local_dtype
from megalora.parallel.mesh import Axis, build_mesh

CPU = torch.device("cpu")
ISA = "ONEDNN_MAX_CPU_ISA"


@pytest.fixture
def cpu(monkeypatch):
    """Make the CPU one with AMX, or without: cpu(True)."""
    monkeypatch.delenv(ISA)
    return lambda amx: monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    ("amx", "allowed", "found"),
    [
        (False, None, False),
        (True, None, True),
        (True, "ALL", True),
        (True, "avx512_core_amx", True),
        (True, "AVX10_1_512_AMX_FP16", True),
        (True, "AVX512_CORE_BF16", False),
        (True, "AVX2", False),
        (False, "ALL", False),
    ],
)
def test_onednn_has_amx_and_may_use_it(cpu, monkeypatch, amx, allowed, found):
    cpu(amx)
    if allowed is not None:
        monkeypatch.setenv(ISA, allowed)
    assert has_amx() == found
    assert local_dtype("auto", CPU) == (torch.bfloat16 if found else torch.float32)


def test_the_reason_is_told(cpu):
    cpu(True)
    assert str(choose_dtype("auto", CPU, Axis())) == "bfloat16 (auto: this CPU has AMX)"
    assert str(choose_dtype("float64", CPU, Axis())) == "float64"
    cpu(False)
    assert str(choose_dtype("auto", CPU, Axis())) == "float32 (auto: this CPU has no AMX)"


@pytest.mark.parametrize("before", ["float32", "bfloat16"])
def test_a_run_that_goes_on_keeps_its_dtype(cpu, before):
    cpu(True)
    assert str(choose_dtype("auto", CPU, Axis(), before)) == f"{before} (auto: as this run began)"
    assert choose_dtype("auto", CPU, Axis(), "float16").dtype == torch.bfloat16, "asked for then, and not now"
    cpu(False)
    assert choose_dtype("auto", CPU, Axis(), "bfloat16").dtype == torch.float32, "not slower than it need be"


def on_unlike_hosts(rank: int, world_size: int):
    with mock.patch("megalora.compute_dtype.has_amx", lambda: rank == 1):
        return str(choose_dtype("auto", CPU, build_mesh(rank, world_size, world_size).world))


def test_ranks_agree_on_what_all_have():
    told = "float32 (auto: a CPU of this run has no AMX)"
    assert spawn(on_unlike_hosts, 2) == [told] * 2


def test_the_tests_themselves_are_in_float32_on_every_machine():
    assert local_dtype("auto", CPU) == torch.float32
