"""Loads the compiled ops (`csrc/`, module `megalora._C`), or says that the torch references stand in."""

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from megalora.ops.sources import digest

logger = logging.getLogger(__name__)

REMEDY = "run `make install` (or `pip install --no-build-isolation -e .`) to build it"
# What they are built from, where the package lies in a source tree; an installed one has nothing of the kind beside it.
CSRC = Path(__file__).resolve().parents[2] / "csrc"


@functools.cache
def load() -> bool:
    """Return whether the compiled ops are there. If not, warn once, on rank 0, and say what to do."""
    return bool(_devices())


def constant_when_compiled(function: Callable[..., bool]) -> Callable[..., bool]:
    """Return what torch.compiler.assume_constant_result does, without the second that its import of the compiler takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any attribute
    return function


@constant_when_compiled
def has_kernels(device_type: str) -> bool:
    """Return whether the compiled ops run on `device_type` ("cpu", "cuda"): decided when the library is loaded."""
    return device_type in _devices()


@constant_when_compiled
@functools.cache
def has_tiles() -> bool:
    """Return whether `tile_linear` runs here: on a CPU with AMX tiles for bfloat16, under Linux 5.16 or later."""
    return has_kernels("cpu") and importlib.import_module("megalora._C").build_info()["tiles"]


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is there: it comes with torch for GPUs."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _devices() -> frozenset[str]:
    try:
        library = importlib.import_module("megalora._C")
    except ModuleNotFoundError as error:
        if error.name != "megalora._C":
            raise
        return _absent("are not installed")
    except ImportError as error:  # the usual sign of another torch: an undefined symbol
        return _absent(f"do not load under torch {torch.__version__} ({str(error).splitlines()[0]})")
    info = library.build_info()
    # No binary interface holds across versions of torch, whether or not its symbols are found.
    if info["torch"] != re.match(r"[\d.]*\d", torch.__version__)[0]:
        return _absent(f"were built for torch {info['torch']} and this is {torch.__version__}")
    # A build that says nothing ("") was not made by setup.py; one that knows no such question is older than it.
    built_from = info.get("sources")
    if built_from != "" and (CSRC / "library.cpp").is_file() and built_from != digest(CSRC):
        return _absent(f"were built from other sources than {CSRC} now has")
    return frozenset(info["devices"])


def _absent(why: str) -> frozenset[str]:
    if os.environ.get("RANK", "0") == "0":  # set by torchrun; the process group need not exist yet
        slower = "attention, LoRA products, norms and dropout"
        logger.warning("megalora's compiled ops %s: slower torch references stand in (%s); %s", why, slower, REMEDY)
    return frozenset()
