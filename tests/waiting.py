"""Waiting for what another process or thread does: for as long as it takes, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 300.0  # seconds for what takes a few on a quiet machine: only what hangs takes longer


def until(what: str, found: Callable[[], T], seconds: float = PATIENCE, told: Callable[[], object] = str) -> T:
    """The first value of `found` that is true. AssertionError, with what `told` returns, where none is in time."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{told()}"
        time.sleep(0.02)
    return value
