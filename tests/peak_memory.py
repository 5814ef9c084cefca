"""The peak memory of a rank of `spawn`, which has the memory of its own process and nothing slow to import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def growth(work: Callable[[], object]) -> int:
    """By how many bytes `work` raises the peak resident memory of this process; pages of mapped files count. Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _peak()
    work()
    return _peak() - before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
