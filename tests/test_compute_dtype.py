"""dtype auto: bfloat16 on CPUs that multiply it fast, the same on every rank, and a run keeps what it began with."""

from unittest import mock

import pytest
import torch
from spawn import spawn

from megalora import compute_dtype
from megalora.compute_dtype import bfloat16_units, choose_dtype, local_dtype
from megalora.parallel.mesh import Axis, build_mesh

CPU = torch.device("cpu")
ISA = "ONEDNN_MAX_CPU_ISA"


@pytest.fixture
def cpu(monkeypatch):
    """Make the CPU one with AMX, or without: cpu(True); or of that vendor, with AVX512-BF16 or without."""
    monkeypatch.delenv(ISA)

    def make(amx: bool, vectors: bool = False, vendor: str = "AuthenticAMD") -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors)
        monkeypatch.setattr(compute_dtype, "_vendor", lambda: vendor)

    return make


@pytest.mark.parametrize(
    ("amx", "allowed", "found"),
    [
        (False, None, ""),
        (True, None, "AMX"),
        (True, "ALL", "AMX"),
        (True, "avx512_core_amx", "AMX"),
        (True, "AVX10_1_512_AMX_FP16", "AMX"),
        (True, "AVX512_CORE_BF16", ""),
        (True, "AVX2", ""),
        (False, "ALL", ""),
    ],
)
def test_onednn_has_amx_and_may_use_it(cpu, monkeypatch, amx, allowed, found):
    cpu(amx, vectors=amx, vendor="GenuineIntel")
    if allowed is not None:
        monkeypatch.setenv(ISA, allowed)
    assert bfloat16_units() == found
    assert local_dtype("auto", CPU) == (torch.bfloat16 if found else torch.float32)


@pytest.mark.parametrize(
    ("vectors", "vendor", "allowed", "found"),
    [
        (True, "AuthenticAMD", None, "AVX512-BF16"),
        (True, "AuthenticAMD", "ALL", "AVX512-BF16"),
        (True, "AuthenticAMD", "avx512_core_bf16", "AVX512-BF16"),
        (True, "AuthenticAMD", "AVX10_1_512", "AVX512-BF16"),
        (True, "AuthenticAMD", "AVX512_CORE_VNNI", ""),
        (True, "AuthenticAMD", "AVX512_CORE", ""),
        (False, "AuthenticAMD", None, ""),
        (True, "GenuineIntel", None, ""),
        (True, "", None, ""),
    ],
)
def test_vectors_of_bfloat16_count_where_they_are_faster(cpu, monkeypatch, vectors, vendor, allowed, found):
    cpu(False, vectors, vendor)
    if allowed is not None:
        monkeypatch.setenv(ISA, allowed)
    assert bfloat16_units() == found
    assert local_dtype("auto", CPU) == (torch.bfloat16 if found else torch.float32)


def test_the_vendor_is_one_that_linux_tells():
    assert compute_dtype._vendor() in {"", "AuthenticAMD", "GenuineIntel", "HygonGenuine", "CentaurHauls"}


def test_the_reason_is_told(cpu):
    cpu(True)
    assert str(choose_dtype("auto", CPU, Axis())) == "bfloat16 (auto: this CPU has AMX)"
    assert str(choose_dtype("float64", CPU, Axis())) == "float64"
    cpu(False, vectors=True)
    assert str(choose_dtype("auto", CPU, Axis())) == "bfloat16 (auto: this CPU has AVX512-BF16)"
    cpu(False)
    assert str(choose_dtype("auto", CPU, Axis())) == (
        "float32 (auto: this CPU has neither AMX nor AMD's AVX512-BF16)"
    )


@pytest.mark.parametrize("before", ["float32", "bfloat16"])
def test_a_run_that_goes_on_keeps_its_dtype(cpu, before):
    cpu(True)
    assert str(choose_dtype("auto", CPU, Axis(), before)) == f"{before} (auto: as this run began)"
    assert choose_dtype("auto", CPU, Axis(), "float16").dtype == torch.bfloat16, "asked for then, and not now"
    cpu(False)
    assert choose_dtype("auto", CPU, Axis(), "bfloat16").dtype == torch.float32, "not slower than it need be"


def on_unlike_hosts(rank: int, world_size: int):
    world = build_mesh(rank, world_size, world_size).world
    told = []
    for units in (["", "AMX"], ["AVX512-BF16", "AMX"]):
        with mock.patch("megalora.compute_dtype.bfloat16_units", lambda units=units: units[rank]):
            told.append(str(choose_dtype("auto", CPU, world)))
    return told


def test_ranks_agree_on_what_all_have():
    told = [
        "float32 (auto: a CPU of this run has neither AMX nor AMD's AVX512-BF16)",
        "bfloat16 (auto: all CPUs have AMX or AVX512-BF16)",
    ]
    assert spawn(on_unlike_hosts, 2) == [told] * 2


def test_the_tests_themselves_are_in_float32_on_every_machine():
    assert local_dtype("auto", CPU) == torch.float32
