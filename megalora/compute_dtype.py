"""The dtype that a model computes in: as the flag says, or by the device where that is auto."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from megalora import choices
from megalora.parallel.collectives import gather_objects
from megalora.parallel.mesh import Axis

DTYPES = {name: getattr(torch, name) for name in choices.DTYPES}

# Values of ONEDNN_MAX_CPU_ISA that let oneDNN, which makes the products, use AMX.
_WITH_AMX = ("", "ALL", "DEFAULT")


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

    name    one of choices.DTYPES; or "auto": bfloat16 on GPUs and on CPUs with AMX, else float32. With AVX512-BF16
            alone bfloat16 was no faster (benchmarks/LOG.md)
    before  dtype of the run that is continued; None: there is none. On CPUs with AMX "auto" keeps to it, as far as it
            is one of the two: a run does not change its rounding because another version or host goes on with it
    """
    if name != "auto":
        return ComputeDtype(DTYPES[name])
    if device.type == "cuda":
        return ComputeDtype(torch.bfloat16, "auto, on GPUs")
    found = gather_objects(has_amx(), world)
    if not all(found):
        return ComputeDtype(torch.float32, f"auto: {'a CPU of this run' if any(found) else 'this CPU'} has no AMX")
    if before in ("float32", "bfloat16"):
        return ComputeDtype(DTYPES[before], "auto: as this run began")
    return ComputeDtype(torch.bfloat16, "auto: this CPU has AMX")


def local_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return what choose_dtype gives one process by itself."""
    return choose_dtype(name, device, Axis()).dtype


def has_amx() -> bool:
    """Return whether oneDNN multiplies bfloat16 in AMX tiles on this CPU.

    ONEDNN_MAX_CPU_ISA, by which oneDNN is told to leave instructions alone, is heeded.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    may = allowed in _WITH_AMX or "AMX" in allowed or allowed.startswith("AVX10_2")
    return may and torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()
