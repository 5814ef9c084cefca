"""Rows with labels: words with a tag each, or texts with one label, from the shapes that data sets have.

| task | shapes |
|---|---|
| TOKEN_CLS | {tokens, tags}, {words, ner_tags}, a CoNLL file; {text, spans: [{start, end, label}]} |
|           | of words on a page: {tokens, tags, bbox} |
| SEQ_CLS   | {text, label}, {sentence1, sentence2, label}, {premise, hypothesis, label} |

A tag or label is a name, or the number of one. Spans become tags in the BIO scheme.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .fields import COLUMNS_FLAG, FieldNames, Fields, json_type, names_of

OUTSIDE = "O"
Label = str | int
Box = tuple[int, int, int, int]
PAGE = 1000  # the most that a coordinate of a box can be

_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "pos_tags", "labels")
_TEXTS = ("text", "sentence", "sentence1", "premise", "question1")
_SECOND = ("text_pair", "sentence2", "hypothesis", "question2")
_BOXES = ("bbox", "bboxes", "boxes")
_SPANS = ("spans", "entities", "label")
_LABELS = ("label", "labels", "class", "intent")
_PARTS = re.compile(r"\w+|[^\w\s]")  # a word, or a punctuation mark


@dataclass(frozen=True)
class Word:
    """A word of a text. spaced: a space, or nothing, stands before it."""

    text: str
    spaced: bool = True


@dataclass(frozen=True)
class TaggedWords:
    """Words and the tag of each; tags None: they are to be found.

    boxes  where each word stands on its page: left, top, right, bottom, in thousandths; None: not told
    """

    words: tuple[Word, ...]
    tags: tuple[Label, ...] | None
    boxes: tuple[Box, ...] | None = None

    @property
    def labels(self) -> tuple[Label, ...]:
        return self.tags or ()


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of them, and its label; label None: it is to be found."""

    text: str
    second: str | None
    label: Label | None

    @property
    def labels(self) -> tuple[Label, ...]:
        return () if self.label is None else (self.label,)


def read_tagged(
    row: Any,
    where: str,
    names: FieldNames | None = None,
    seen: Counter[str] | None = None,
    *,
    question: bool = False,
    boxed: bool = False,
) -> TaggedWords:
    """Return one row as words and their tags.

    question  tags are asked for, and need not be there; boxed: each word has a box, which is read

    Raises UserError for a row that is malformed, that has another number of tags than of words, whose spans overlap or
    end beyond the text, or that has a field which is not read.
    """
    fields = _fields(row, where, names, seen, question)
    if fields.present(_WORDS):
        words = _texts(fields.take(*_WORDS), fields.place, "tokens")
        tags = fields.take(*_TAGS)
        if tags is None and question:
            found = None
        elif not isinstance(tags, list) or not all(_is_label(tag) for tag in tags):
            raise UserError(
                f"{fields.place}: tags is not a list of strings or numbers", "give a list with a tag for each token"
            )
        elif len(tags) != len(words):
            raise UserError(f"{fields.place}: {len(words)} tokens but {len(tags)} tags", "give each token one tag")
        else:
            found = tuple(tags)
        boxes = _boxes(fields.take(*_BOXES), len(words), fields.place) if boxed else None
        fields.finish()
        return TaggedWords(tuple(Word(word) for word in words), found, boxes)
    if boxed:
        said = f"{fields.place}: has no tokens (fields {names_of(row)}), of which each would have a box"
        raise UserError(said, f"write {{tokens, tags, bbox}}, or map other names with {COLUMNS_FLAG}")
    if not fields.present(_TEXTS):
        raise UserError(
            f"{fields.place}: no known shape (fields {names_of(row)})",
            f"write {{tokens, tags}} or {{text, spans}}, or map other names with {COLUMNS_FLAG}",
        )
    text = _text(fields.take(*_TEXTS), fields.place)
    given, named = fields.present(_SPANS), fields.take_named(*_SPANS)
    if not given and not question:
        raise UserError(f"{fields.place}: has a text but no spans", "give spans, [] where the text has no entity")
    fields.finish()
    spans = [] if named is None else _spans(named[1], text, fields.place)
    tagged, tags = _tagged(text, spans)
    return TaggedWords(tagged, tags if given else None)


def read_labelled(
    row: Any, where: str, names: FieldNames | None = None, seen: Counter[str] | None = None, *, question: bool = False
) -> LabelledText:
    """Return one row as a text with its label. question: the label is asked for, and need not be there.

    Raises UserError for a row that is malformed, lacks a text or label, or has a field which is not read.
    """
    fields = _fields(row, where, names, seen, question)
    if not fields.present(_TEXTS):
        raise UserError(
            f"{fields.place}: no known shape (fields {names_of(row)})",
            f"write {{text, label}} or {{sentence1, sentence2, label}}, or map other names with {COLUMNS_FLAG}",
        )
    text, second = _text(fields.take(*_TEXTS), fields.place), fields.take(*_SECOND)
    if second is not None:
        second = _text(second, fields.place)
    label = fields.take(*_LABELS)
    if label is None and not question:
        raise UserError(f"{fields.place}: has no label", "add one, or leave the row out")
    if label is not None and not _is_label(label):
        raise UserError(f"{fields.place}: label is a JSON {json_type(label)}", "give one name or number")
    fields.finish()
    return LabelledText(text, second, label)


def _fields(row: Any, where: str, names: FieldNames | None, seen: Counter[str] | None, question: bool) -> Fields:
    if question and isinstance(row, str):
        row = {"text": row}
    if question and isinstance(row, dict) and "prompt" in row and "text" not in row:
        row = {("text" if name == "prompt" else name): value for name, value in row.items()}
    if not isinstance(row, dict) or not row:
        kind = "an empty object" if row == {} else f"a JSON {json_type(row)}"
        raise UserError(f"{where}: the row is {kind}", "make it an object with fields")
    return Fields(row, where, "", names or FieldNames(), Counter() if seen is None else seen)


def _is_label(value: Any) -> bool:
    return (isinstance(value, str) and bool(value)) or (isinstance(value, int) and not isinstance(value, bool))


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if value is None or isinstance(value, str) else f"is a JSON {json_type(value)}"
        raise UserError(f"{place}: the text {what}", "give a string with something in it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place}: the text has half of a surrogate pair", "fix its encoding") from None
    return value


def _texts(value: Any, place: str, name: str) -> list[str]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a JSON {json_type(value)}"
        raise UserError(f"{place}: {name} is {what}", "give a list of words")
    return [_text(word, f"{place}: token {number}") for number, word in enumerate(value)]


def _boxes(value: Any, count: int, place: str) -> tuple[Box, ...]:
    """Return the boxes of `count` words."""
    if not isinstance(value, list):
        what = "has no bbox" if value is None else f"bbox is a JSON {json_type(value)}"
        raise UserError(f"{place}: {what}", "give bbox, a list with [left, top, right, bottom] for each token")
    if len(value) != count:
        raise UserError(f"{place}: {count} tokens but {len(value)} boxes in bbox", "give each token one box")
    for number, box in enumerate(value):
        whole = isinstance(box, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in box)
        if not whole or len(box) != 4 or min(box) < 0 or max(box) > PAGE or box[0] > box[2] or box[1] > box[3]:
            raise UserError(
                f"{place}: box {number} of bbox is {box!r:.60}, not [left, top, right, bottom] in whole numbers from 0 "
                f"to {PAGE}",
                f"scale the page to {PAGE} x {PAGE}, from the upper left corner",
            )
    return tuple(tuple(box) for box in value)


def _spans(value: Any, text: str, place: str) -> list[tuple[int, int, str]]:
    """Return the spans of a text, in order: {start, end, label} or [start, end, label] each, counted in characters."""
    if not isinstance(value, list):
        raise UserError(f"{place}: spans is a JSON {json_type(value)}", "give a list of {start, end, label}")
    spans = []
    for number, span in enumerate(value):
        parts = span
        if isinstance(span, Mapping):
            parts = [span.get("start"), span.get("end"), span.get("label", span.get("type", span.get("entity")))]
        if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], str) or not parts[2]:
            raise UserError(f"{place}: span {number} is not {{start, end, label}}", "correct it")
        start, end, label = parts
        sound = all(isinstance(n, int) and not isinstance(n, bool) for n in (start, end))
        if not sound or not 0 <= start < end <= len(text) or not text[start:end].strip():
            raise UserError(
                f"{place}: span {number} ({label}) goes from {start!r} to {end!r} in a text of {len(text)} characters",
                "correct it",
            )
        spans.append((start, end, label))
    spans.sort()
    for (_, end, label), (start, _, other) in zip(spans[:-1], spans[1:], strict=True):
        if start < end:
            raise UserError(f"{place}: the spans {label} and {other} overlap", "keep one of them")
    return spans


def _tagged(text: str, spans: Sequence[tuple[int, int, str]]) -> tuple[tuple[Word, ...], tuple[Label, ...]]:
    """Return the words of a text, cut at the bounds of its spans too, and their tags: B-label, I-label or O."""
    bounds = sorted({bound for start, end, _ in spans for bound in (start, end)})
    words, tags = [], []
    for match in _PARTS.finditer(text):
        inner = [bound for bound in bounds if match.start() < bound < match.end()]
        edges = [match.start(), *inner, match.end()]
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            spaced = start == 0 or text[start - 1].isspace()
            words.append(Word(text[start:end], spaced))
            tags.append(_tag(start, spans, text))
    return tuple(words), tuple(tags)


def _tag(start: int, spans: Sequence[tuple[int, int, str]], text: str) -> str:
    for first, end, label in spans:
        if first <= start < end:
            return f"B-{label}" if not text[first:start].strip() else f"I-{label}"
    return OUTSIDE
