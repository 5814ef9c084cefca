"""Entities in a sequence of tags, and their F1: what seqeval and the CoNLL-2000 script count.

An entity is (type, first word, word behind its last). A tag is O, or a prefix and a type, "B-PER". B- and S- begin an
entity, E- and S- end one; I- goes on with one of its type that is open, and begins one where none is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_PREFIXES = ("B", "I", "E", "S", "L", "U")


class Entity(NamedTuple):
    """A span of words of one type."""

    kind: str
    start: int
    stop: int


def are_entity_tags(labels: Sequence[str]) -> bool:
    """Return whether labels are tags of entities: O, and a prefix and a type each."""
    others = [label for label in labels if label != "O"]
    return bool(others) and all(label[:1] in _PREFIXES and label[1:2] == "-" and label[2:] for label in others)


def kinds_of(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the types of entities that tags have, sorted."""
    return tuple(sorted({label[2:] for label in labels if label != "O"}))


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the entities of the tags of one document."""
    found: set[Entity] = set()
    kind, begun = "", 0  # the open entity, where there is one
    for place, tag in enumerate((*tags, "O")):
        prefix, _, its = tag.partition("-") if tag != "O" else ("O", "", "")
        begins = prefix in ("B", "S", "U") or its != kind
        if kind and begins:
            found.add(Entity(kind, begun, place))
            kind = ""
        if its and not kind:
            kind, begun = its, place
        if kind and prefix in ("E", "S", "L", "U"):
            found.add(Entity(kind, begun, place + 1))
            kind = ""
    return found


class Counts(NamedTuple):
    """Entities (or words) that are right, that were found, and that are there."""

    right: float
    found: float
    there: float

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        return self.right / self.there if self.there else 0.0

    @property
    def f1(self) -> float:
        return 2 * self.right / (self.found + self.there) if self.found + self.there else 0.0


def count(predicted: Sequence[str], expected: Sequence[str], kinds: Sequence[str]) -> list[Counts]:
    """Return the Counts of each type of entity in one document."""
    ours, theirs = entities(predicted), entities(expected)

    def of(kind: str, chosen: set[Entity]) -> int:
        return sum(entity.kind == kind for entity in chosen)

    return [Counts(of(kind, ours & theirs), of(kind, ours), of(kind, theirs)) for kind in kinds]
