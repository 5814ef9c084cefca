"""CUDA sources of csrc/cuda, compiled for a CPU by g++: tests/ops/emulated stands for what CUDA has."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests/ops/emulated"


def compiled(folder: Path, pattern: str) -> ctypes.CDLL:
    """The library of the sources of tests/ops/emulated that match, built in `folder`. Skips without g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    library = folder / "emulated.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, *map(str, HERE.glob(pattern)), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
