"""Regular expressions of an adapter's config, which may be a stranger's: matched within a time, or refused.

Python's `re`, in which peft reads them, cannot be stopped: an expression like (a+)+b takes longer than anybody waits.
They are compiled by `re`, which says whether they are right, and matched by `regex`, which has a time limit.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import regex

from megalora.errors import UserError

MATCH_SECONDS = 1.0  # of one match: of a usual expression it takes microseconds
ALL_SECONDS = 20.0  # of all matches of a config against a model
_LONGEST = 1 << 14  # characters of an expression
_MOST_REPEATED = 1 << 14  # the counts of an expression, like {3} or {2,5}, multiplied: it is compiled as long
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_PLAIN = re.compile(r"\w+")


def check_pattern(pattern: Any, where: str) -> None:
    """Raise UserError where a value is no regular expression, or one too long to be compiled."""
    if not isinstance(pattern, str):
        raise UserError(f"{where}: {pattern!r:.200} is not a regular expression", "write it as text")
    counts = (int(number[-9:]) for found in _COUNT.finditer(pattern) for number in found.groups() if number)
    if len(pattern) > _LONGEST or math.prod(max(count, 1) for count in counts) > _MOST_REPEATED:
        raise UserError(f"{where}: {pattern!r:.200} is too long a regular expression", "name the modules in a list")
    try:
        with warnings.catch_warnings():  # on the syntax of later versions of Python
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        said = f"{pattern!r:.200} is not a regular expression ({why})"
        raise UserError(f"{where}: {said}", "fix the expression") from None


class Patterns:
    """Matches expressions that `check_pattern` has let through. Raises UserError where they take too long."""

    def __init__(self) -> None:
        self._left = ALL_SECONDS
        self._compiled: dict[str, Any] = {}

    def fits(self, pattern: str, name: str) -> bool:
        """Return whether an expression matches a whole name."""
        if pattern not in self._compiled:
            self._compiled[pattern] = regex.compile(pattern)
        began = time.monotonic()
        try:
            found = self._compiled[pattern].fullmatch(name, timeout=min(MATCH_SECONDS, max(self._left, 0.001)))
        except TimeoutError:
            raise UserError(
                f"lora_config: the regular expression {pattern!r:.200} takes too long to match {name!r:.200}",
                "write it without repetitions of repetitions, or name the modules in a list",
            ) from None
        self._left -= time.monotonic() - began
        return found is not None

    def fits_end(self, pattern: str, name: str) -> bool:
        """Return whether an expression matches a whole name, or its end behind a dot: peft's rule of rank_pattern."""
        if _PLAIN.fullmatch(pattern):
            return name.rpartition(".")[2] == pattern
        return self.fits(rf"(.*\.)?({pattern})", name)

    def value(self, patterns: Mapping[str, float], name: str, default: float) -> float:
        """Return the value of the first expression that `fits_end`; default: where none does."""
        return next((value for pattern, value in patterns.items() if self.fits_end(pattern, name)), default)


def ends_of(name: str) -> set[str]:
    """Return the name itself and what follows each of its dots."""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def named(names: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Return those of `names` that, or the end of which behind a dot, are among `wanted`."""
    among = set(wanted)
    return [name for name in names if not among.isdisjoint(ends_of(name))]
