"""The dtype that a model computes in: as the flag says, or by the device where that is auto."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megalora import choices
from megalora.parallel.collectives import gather_objects
from megalora.parallel.mesh import Axis

DTYPES = {name: getattr(torch, name) for name in choices.DTYPES}

# Values of ONEDNN_MAX_CPU_ISA that leave oneDNN, which makes the products, all that a CPU has.
_ALL = ("", "ALL", "DEFAULT")


@dataclass(frozen=True)
class ComputeDtype:
    """A compute dtype, and why it is this one; why is empty where it was asked for."""

    dtype: torch.dtype
    why: str = ""

    def __str__(self) -> str:
        """Return it as told to the user: "bfloat16 (auto: this CPU has AMX)"."""
        return str(self.dtype).removeprefix("torch.") + (f" ({self.why})" if self.why else "")


def choose_dtype(name: str, device: torch.device, world: Axis, before: str | None = None) -> ComputeDtype:
    """Return the compute dtype. Collective, as every rank must have the same.

    name    one of choices.DTYPES; or "auto": bfloat16 on GPUs and on CPUs that multiply it faster than float32, else
            float32
    before  dtype of the run that is continued; None: there is none. On CPUs where "auto" is bfloat16 it keeps to it, as
            far as it is one of the two: a run does not change its rounding because another version or host goes on
            with it
    """
    if name != "auto":
        return ComputeDtype(DTYPES[name])
    if device.type == "cuda":
        return ComputeDtype(torch.bfloat16, "auto, on GPUs")
    found = gather_objects(bfloat16_units(), world)
    if not all(found):
        which = "a CPU of this run" if any(found) else "this CPU"
        return ComputeDtype(torch.float32, f"auto: {which} has neither AMX nor AMD's AVX512-BF16")
    if before in ("float32", "bfloat16"):
        return ComputeDtype(DTYPES[before], "auto: as this run began")
    units = " or ".join(sorted(set(found)))
    return ComputeDtype(torch.bfloat16, f"auto: {'this CPU has' if world.size == 1 else 'all CPUs have'} {units}")


def local_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return what choose_dtype gives one process by itself."""
    return choose_dtype(name, device, Axis()).dtype


def bfloat16_units() -> str:
    """Return by what oneDNN multiplies bfloat16 at least twice as fast as float32 on this CPU; "": by nothing.

    "AMX", or "AVX512-BF16" on AMD's CPUs (Zen 4 and later). Intel's with AVX512-BF16 alone are no faster in a step than
    in float32 (benchmarks/LOG.md). ONEDNN_MAX_CPU_ISA, by which oneDNN is told to leave instructions alone, is heeded.
    """
    if not torch.backends.mkldnn.is_available():
        return ""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    amx = allowed in _ALL or "AMX" in allowed or allowed.startswith("AVX10_2")
    if amx and torch.cpu._is_amx_tile_supported():
        return "AMX"
    # Of the names that oneDNN documents, those in the order of their instructions from AVX512_CORE_BF16 on.
    vectors = amx or allowed in ("AVX512_CORE_BF16", "AVX512_CORE_FP16") or allowed.startswith("AVX10_1")
    if vectors and torch.cpu._is_avx512_bf16_supported() and _vendor() == "AuthenticAMD":
        return "AVX512-BF16"
    return ""


def _vendor() -> str:
    """Return the CPU's vendor as Linux tells it; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
