"""Encoding: chunks of raw rows -> token ids and label runs, with every row that cannot be used counted by kind.

This is the work that is shared out over the cores of a node: an encoder can be pickled, and what it returns is arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError
from .conversation import Conversation, TrainOn
from .documents import Documents
from .fields import FieldNames
from .formats import to_conversation
from .long_rows import split, truncate
from .readers import Chunk
from .report import Report, reason_of
from .template import IGNORE, ChatTemplate, Sample, Segment

_PLACEHOLDER = re.compile(r"\{\{ ?(name|author) ?\}\}")  # of LLaMA-Factory's identity.json
OnLongRow = Literal["error", "skip", "truncate", "split"]


@dataclass(frozen=True)
class EncodeSettings:
    """How a row becomes documents.

    seq_length   tokens of the longest document
    on_long_row  what becomes of a longer one: "error" (a bad row), "skip", "truncate", "split"
    train_on     the rule of the run for what is labelled, where the row does not say so itself
    names        the user's word on the names of fields
    before       tokens of an image that will stand before each document
    """

    seq_length: int
    on_long_row: OnLongRow = "error"
    train_on: TrainOn = "all"
    names: FieldNames = field(default_factory=FieldNames)
    before: int = 0


@dataclass(frozen=True)
class Encoder:
    """Turns chunks of rows into documents. It is pickled to other processes."""

    template: ChatTemplate
    settings: EncodeSettings

    def encode(self, chunk: Chunk) -> tuple[Documents, Report]:
        """Return the documents of a chunk, in order, and the report. Raises readers.NotLines."""
        report = Report()
        named: list[tuple[int, str, Conversation]] = []
        pieces: list[list[Segment]] = []
        for number, row in enumerate(chunk.parse(), chunk.first):
            report.rows += 1
            where = f"{chunk.path} row {number}"
            try:
                conversation = to_conversation(row, where, self.settings.names, report.seen)
                conversation = conversation.resolve(self.settings.train_on)
                made = self.template.documents(conversation)
            except UserError as error:
                report.problem(where, reason_of(error, where))
                continue
            pieces += [document.pieces for document in made]
            named += [(number, where, document.conversation) for document in made]
            report.seen["template special"] += sum(document.special_in_text for document in made)
            report.seen["template ids"] += any(document.made_ids for document in made)
            report.seen["template placeholders"] += _has_placeholder(conversation)
            report.seen["template weighted"] += any(document.weighted for document in made)
            if len(made) > 1:
                report.seen["template split"] += 1
                report.seen["template documents"] += len(made)
        documents: list[Sample] = []
        rows: list[int] = []
        for (number, where, conversation), sample in zip(named, self.template.tokenize(pieces), strict=True):
            for document in self._fitting(where, conversation, sample, report):
                documents.append(document)
                rows.append(number)
        encoded = Documents.of(documents, rows)
        report.top = int(encoded.ids.max()) if len(encoded) else 0
        return encoded, report

    def _fitting(self, where: str, conversation: Conversation, sample: Sample, report: Report) -> Iterator[Sample]:
        """Yield the documents of a row: itself, or what on_long_row makes of it; none where it cannot be used."""
        settings, length = self.settings, self.settings.before + len(sample.input_ids)
        report.length(length, where)
        documents = [sample]
        if length > settings.seq_length:
            reason = f"too long, {length} tokens for --seq_length {settings.seq_length}"
            if settings.on_long_row == "error":
                remedy = f"raise --seq_length to at least {length}, or say what becomes of it with --on_long_row"
                report.problem(where, f"{reason}; {remedy} split, truncate or skip")
                return
            if settings.on_long_row == "skip":
                report.problem(where, reason, wanted=True)
                return
            make = truncate if settings.on_long_row == "truncate" else split
            try:
                documents, done = make(conversation, sample, settings.seq_length - settings.before, self._encode_one)
            except UserError as error:
                report.problem(where, f"{reason}: {reason_of(error, where)}")
                return
            report.seen[f"long {done}"] += 1
            report.seen["long documents"] += len(documents)
        learned = [document for document in documents if (document.labels[1:] != IGNORE).any()]
        if not learned and length > settings.seq_length:
            report.problem(where, f"{reason}: nothing that is trained is left when it is cut; raise --seq_length")
        elif not learned:
            report.problem(where, "no token to learn; fix the row")
        yield from learned

    def _encode_one(self, conversation: Conversation) -> Sample:
        return self.template.tokenize([self.template.segments(conversation)])[0]


def _has_placeholder(conversation: Conversation) -> bool:
    return any("{{" in message.content and _PLACEHOLDER.search(message.content) for message in conversation.messages)
