"""Report: what became of the rows, by kind, and the lines and the error that say so."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from .fields import COLUMNS_FLAG, IGNORE_FLAG, FieldNames, shown

_KINDS = 20  # kinds of bad rows that are told one by one
_FIELDS = 12
# What was seen in the rows -> a line for the start-up, behind the number of rows.
_TOLD = {
    "template weighted": "rows have weights of their own: the loss is the weighted mean over the labels",
    "template ids": "rows have ids of tool calls that were made for the template, of nine letters and digits",
    "template placeholders": "rows hold {{name}} or {{author}} and learn just that: put the names in their place first",
}


@dataclass
class Report:
    """What became of the rows.

    rows      how many were read
    problems  kind -> (how many rows, the first one with its place, whether it was left out as too long on purpose)
    seen      fields that are not read ("field id"), the user's columns that were met, and what was cut or split
    lengths   tokens -> how many rows have that many, those too long included: the lengths that rows ask for
    longest   (tokens, place) of the longest row
    top       the largest token id
    """

    rows: int = 0
    problems: dict[str, tuple[int, str, bool]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    longest: tuple[int, str] = (0, "")
    top: int = 0
    _last: tuple[str, str] = ("", "")

    def problem(self, where: str, reason: str, *, wanted: bool = False) -> None:
        """Count a row that is left out, or one of its documents: a row counts once a kind."""
        kind = kind_of(reason)
        if self._last == (where, kind):
            return
        self._last = (where, kind)
        count, first, _ = self.problems.get(kind, (0, f"{where}: {reason}", wanted))
        self.problems[kind] = (count + 1, first, wanted)

    def length(self, tokens: int, where: str) -> None:
        """Count the tokens of a row."""
        self.lengths[tokens] += 1
        if tokens > self.longest[0]:
            self.longest = (tokens, where)

    def add(self, other: Report) -> None:
        """Add the report of the rows that come next."""
        self.rows += other.rows
        for kind, (count, first, wanted) in other.problems.items():
            before = self.problems.get(kind, (0, first, wanted))
            self.problems[kind] = (before[0] + count, before[1], wanted)
        self.seen += other.seen
        self.lengths += other.lengths
        self.top = max(self.top, other.top)
        if other.longest[0] > self.longest[0]:
            self.longest = other.longest

    @property
    def left_out(self) -> int:
        return sum(count for count, _, _ in self.problems.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "problems": self.problems,
            "seen": self.seen,
            "lengths": sorted(self.lengths.items()),
            "longest": self.longest,
            "top": self.top,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Report:
        return cls(
            fields["rows"],
            {kind: tuple(problem) for kind, problem in fields["problems"].items()},
            Counter(fields["seen"]),
            Counter(dict(fields["lengths"])),
            tuple(fields["longest"]),
            fields["top"],
        )

    def check_names(self, names: FieldNames) -> None:
        """Raise UserError for the user's names that no row has."""
        met = {name.partition(" ")[2] for name in self.seen if name.startswith(("column ", "ignored "))}
        for flag, wanted in ((COLUMNS_FLAG, names.columns), (IGNORE_FLAG, names.ignored)):
            for name in sorted(set(wanted) - met):
                raise UserError(
                    f"{flag}: no row has a field {shown(name)}", f"check the name, or take it out of {flag}"
                )

    def check_rows(self, on_bad_row: str) -> None:
        """Raise UserError for rows that cannot be used under on_bad_row "error"."""
        bad = {kind: problem for kind, problem in self.problems.items() if not problem[2]}
        if bad and on_bad_row == "error":
            raise self._error(bad)

    def _error(self, bad: dict[str, tuple[int, str, bool]]) -> BadRows:
        remedy = "leave bad rows out with --on_bad_row skip"
        count = sum(problem[0] for problem in bad.values())
        if count == 1:
            message, hint = message_and_hint(next(iter(bad.values()))[1])
            return BadRows(message, f"{hint or 'fix the row'}, or {remedy}")
        lines = [f"{count:,} of {self.rows:,} rows cannot be used:", *_by_kind(bad)]
        if any("too long" in kind for kind in bad):
            lines.append(self.lengths_line())
        return BadRows("\n".join(lines), f"fix them, or {remedy}")

    def lengths_line(self) -> str:
        """Return what the longest row has, and which seq_length would hold how many of the rows."""
        parts = [f"{quantile(self.lengths, share)} holds {name}" for share, name in ((0.95, "95%"), (0.99, "99%"))]
        longest, where = self.longest
        wanted = f"--seq_length {', '.join(parts)}, {longest} all of them"
        return f"the longest row is {where} with {longest} tokens; {wanted}"

    def notes(self) -> tuple[str, ...]:
        """Return lines for the start-up: one a kind of rows left out, the fields that are not read, what was cut."""
        notes = []
        if self.left_out:
            notes.append(f"{self.left_out:,} of {self.rows:,} rows are left out:")
            notes += _by_kind(self.problems)
        fields = Counter({name.partition(" ")[2]: n for name, n in self.seen.items() if name.startswith("field ")})
        if fields:
            told = [f"{name} ({count:,})" for name, count in fields.most_common(_FIELDS)]
            more = f" and {len(fields) - _FIELDS} more" if len(fields) > _FIELDS else ""
            notes.append(f"fields of the rows that are not learned: {', '.join(told)}{more}")
        for name, count in sorted(self.seen.items()):
            if name.startswith("long ") and name != "long documents":
                into = f" into {self.seen['long documents']:,} documents" if name == "long split" else ""
                notes.append(f"{count:,} rows longer than seq_length were {name.removeprefix('long ')}{into}")
        if self.seen["template split"]:
            rows, documents = self.seen["template split"], self.seen["template documents"]
            notes.append(
                f"{rows:,} rows became {documents:,} documents, because the template prints earlier replies otherwise "
                "than they are generated (without their thinking): --history_thinking mask or keep makes one of each"
            )
        notes += [f"{self.seen[name]:,} {told}" for name, told in _TOLD.items() if self.seen[name]]
        if self.seen["template special"]:
            count = self.seen["template special"]
            notes.append(
                f"special tokens in the text of messages are tokenised as text ({count:,} time{'s' * (count > 1)}): "
                "--special_tokens_in_text true takes them for the tokens"
            )
        return tuple(notes)


class BadRows(UserError):
    """Rows that cannot be used: a line a kind."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, hint)
        self.message = message  # with its line breaks
        between = "\n" if "\n" in message else ": "
        self.args = (message if hint is None else f"{message}{between}{hint}",)


def _by_kind(problems: dict[str, tuple[int, str, bool]]) -> list[str]:
    ordered = sorted(problems.values(), key=lambda problem: -problem[0])
    lines = [f"{count:,} x {first}" + (" (the first)" if count > 1 else "") for count, first, _ in ordered[:_KINDS]]
    if len(ordered) > _KINDS:
        rest = ordered[_KINDS:]
        lines.append(f"{sum(count for count, _, _ in rest):,} more rows of {len(rest)} more kinds")
    return lines


def reason_of(error: UserError, where: str) -> str:
    """Return why a row cannot be used as one line, "message; hint", without its place."""
    message = error.message.removeprefix(where).removeprefix(":").strip()
    return message if error.hint is None else f"{message}; {error.hint}"


def message_and_hint(reason: str) -> tuple[str, str | None]:
    """Return the two parts of a line of `reason_of`."""
    message, separator, hint = reason.rpartition("; ")
    return (message, hint) if separator else (reason, None)


def kind_of(reason: str) -> str:
    """Return what reasons of one kind have in common: the text without its numbers and quoted words."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", reason)[:300]


def quantile(lengths: Counter[int], share: float) -> int:
    """Return the least number of tokens that holds this share of the rows."""
    wanted, seen = share * sum(lengths.values()), 0
    for tokens in sorted(lengths):
        seen += lengths[tokens]
        if seen >= wanted:
            return tokens
    return 0
