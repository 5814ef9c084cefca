"""One flag: its definition, and its values from the command line, YAML and Python."""

from __future__ import annotations

import functools
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from megalora.errors import UserError

REQUIRED = MISSING
"""Default of a flag that must be given."""

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_FLOAT = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"


@dataclass(frozen=True, eq=False)
class Definition:
    """What a flag means and takes. A flag that several sections share is one object of this class.

    help            one line, with the unit
    choices         the values of a text flag
    at_least, ...   bounds of a number; `above` and `below` exclude the bound
    empty           a text may be empty
    verbatim        texts are taken as they are, commas and blanks too
    training_only   has no effect in generation, which shares the section
    exists          the value is a path that must exist: what to name, for the hint
    """

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    empty: bool = False
    verbatim: bool = False
    training_only: bool = False
    exists: str | None = None

    def field(self, default: Any, unset: str | None = None) -> Any:
        """Return a dataclass field that is this flag. `unset`: what a default of None comes to."""
        return field(default=default, metadata={"definition": self, "unset": unset})

    def bounds(self) -> str:
        """Return the bounds as words after "a number", such as " of at least 0 and below 1"."""
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        return f" of {words}" if words.startswith("at") else f" {words}" if words else ""

    def holds(self, number: float) -> bool:
        """Return whether a number is within the bounds."""
        return not (
            (self.at_least is not None and number < self.at_least)
            or (self.above is not None and number <= self.above)
            or (self.at_most is not None and number > self.at_most)
            or (self.below is not None and number >= self.below)
        )


def flag(default: Any, help: str, *, unset: str | None = None, **limits: Any) -> Any:
    """Return a dataclass field that is a flag of one section alone; `limits` as in `Definition`."""
    return Definition(help, **limits).field(default, unset)


class Section:
    """Base of the sections of flags: a value from Python is held to the same limits as one from the command line."""

    def __post_init__(self) -> None:
        section: type = type(self)
        for one in flags_of(section):
            one.check(getattr(self, one.name), one.name)


@dataclass(frozen=True)
class Flag:
    """A flag of one section. `type` is bool, int, float or str (of each item where there are many)."""

    name: str
    type: type
    many: bool
    optional: bool
    default: Any
    unset: str | None
    definition: Definition

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def help(self) -> str:
        return self.definition.help

    def values(self) -> str:
        """Return what to write after the flag: true|false, a|b, N, X or TEXT, and ... where it takes several."""
        plain = {bool: "true|false", int: "N", float: "X", str: "TEXT"}[self.type]
        return ("|".join(self.definition.choices) or plain) + (" ..." if self.many else "")

    def default_text(self) -> str:
        """Return the default as `--help` prints it."""
        if self.required:
            return "required"
        return f"default: {self.unset if self.default is None else show(self.default)}"

    def kind(self) -> str:
        """Return what a value is, such as "a whole number"."""
        return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[self.type]

    def expected(self) -> str:
        """Return what a sound value is, within its limits."""
        if self.definition.choices:
            return f"one of {', '.join(self.definition.choices)}"
        return self.kind() + self.definition.bounds()

    def from_text(self, texts: Sequence[str], label: str) -> Any:
        """Return the value of the words after a flag; `label` names the flag in an error."""
        if self.many and self.definition.verbatim:
            value: Any = tuple(texts)
        elif self.many:
            words = [word for text in texts for word in re.split(r"[,\s]+", text) if word]
            if not words:
                raise UserError(f"{label} has no value", f"give one or more values, each {self.expected()}")
            value = tuple(self._scalar(word, label) for word in words)
        else:
            (text,) = texts
            value = self._scalar(text, label)
        self.check(value, label)
        return value

    def from_yaml(self, value: Any, label: str) -> Any:
        """Return the value of a YAML node. A text is read as on the command line (YAML takes 2e-4 for a text)."""
        items = value if isinstance(value, list) and self.many else [value]
        if all(isinstance(item, str) for item in items):
            return self.from_text(items, label)
        for item in items:
            number = isinstance(item, (int, float)) and not isinstance(item, bool)
            fits = {
                bool: isinstance(item, bool) or item in (0, 1),
                int: number and isinstance(item, int),
                float: number and abs(item) < 1e300,
                str: isinstance(item, str),
            }[self.type]
            if isinstance(item, (list, dict)) or not fits:
                quotes = ", in quotes" if self.type is str else ""
                raise UserError(f"{label} {show(item)} is not {self.kind()}", f"give {self.expected()}{quotes}")
        read = tuple(self.type(item) for item in items)
        result = read if self.many else read[0]
        self.check(result, label)
        return result

    def from_python(self, value: Any, label: str) -> Any:
        """Return the value of a Python object: paths become texts, lists tuples; the rest is as it is, and checked."""
        items = [*value] if self.many and isinstance(value, (list, tuple)) else [value]
        items = [os.fspath(item) if self.type is str and isinstance(item, os.PathLike) else item for item in items]
        result = tuple(items) if self.many else items[0]
        self.check(result, label)
        return result

    def check(self, value: Any, label: str) -> None:
        """Raise UserError where the value is outside the limits."""
        if value is None and self.optional:
            return
        for item in value if self.many and isinstance(value, tuple) else (value,):
            problem = self._problem(item)
            if problem:
                raise UserError(f"{label} {problem[0]}", problem[1])

    def check_exists(self, value: str | None) -> None:
        """Raise UserError where the value is a path that must exist and does not."""
        if value is not None and self.definition.exists is not None and not os.path.exists(value):
            raise UserError(f"{self.name} {value} does not exist", f"name {self.definition.exists}")

    def _problem(self, item: Any) -> tuple[str, str] | None:
        """Return (what is wrong with one value, what to do) or None."""
        accepted: dict[type, tuple[Any, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
        if not isinstance(item, accepted[self.type]) or (self.type is not bool and isinstance(item, bool)):
            said = repr(item) if isinstance(item, str) else show(item)
            return f"{said} is not {self.kind()}", f"give {self.expected()}"
        choices = self.definition.choices
        if choices:
            return None if item in choices else (f"{show(item)} is unknown", f"choose {self.expected()}")
        if self.type is str:
            blank = not (item if self.definition.verbatim else item.strip())
            return (
                (f"{item!r} is empty", "give a value, or leave it out") if blank and not self.definition.empty else None
            )
        if self.type is float and not math.isfinite(item):
            return f"{show(item)} is not a finite number", f"give {self.expected()}"
        return None if self.definition.holds(item) else (f"{show(item)} is out of range", f"give {self.expected()}")

    def _scalar(self, text: str, label: str) -> Any:
        word = text.strip()
        if self.type is bool and word.lower() in _BOOLEANS:
            return _BOOLEANS[word.lower()]
        if self.type is int and re.fullmatch(r"[+-]?[0-9]{1,40}", word):
            return int(word)
        if self.type is float and re.fullmatch(_FLOAT, word):
            return float(word)
        if self.type is str:
            return text
        raise UserError(f"{label} {text!r} is not {self.kind()}", f"give {self.expected()}")


@functools.cache
def flags_of(section: type) -> tuple[Flag, ...]:
    """Return the flags of a section dataclass, in the order of its fields."""
    hints = typing.get_type_hints(section)
    return tuple(_flag_of(one, hints[one.name]) for one in fields(section))


def _flag_of(one: Any, hint: Any) -> Flag:
    optional = isinstance(hint, types.UnionType)
    if optional:
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not type(None))
    many = typing.get_origin(hint) is tuple
    definition, unset = one.metadata["definition"], one.metadata["unset"]
    return Flag(one.name, typing.get_args(hint)[0] if many else hint, many, optional, one.default, unset, definition)


def table_of(sections: Sequence[type]) -> dict[str, Flag]:
    """Return the flags of several sections by name; of two with one name, the first."""
    table: dict[str, Flag] = {}
    for one in (one for section in sections for one in flags_of(section)):
        table.setdefault(one.name, one)
    return table


def show(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return " ".join(show(item) for item in value)
    return repr(value) if value is None or value == "" else str(value)
