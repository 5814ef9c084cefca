"""Sequence to sequence: rows of a source and a target -> token ids, for SEQ_2_SEQ_LM.

| shape | |
|---|---|
| {input, output}, {source, target}, {text, summary} | other names of the same: see PAIRS; --columns maps others |

Both sides are tokenised with the special tokens that the tokenizer sets around a text, as transformers does.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..tokenizer_files import write_tokenizer
from .documents import Documents
from .encode import EncodeSettings
from .fields import FieldNames, Fields, json_type, names_of
from .packing import Sides
from .pieces import IGNORE, Sample
from .readers import Chunk
from .report import Report
from .tokenizer import OpenedTokenizer

PAIRS = (  # names of source and target
    ("input", "output"), ("source", "target"), ("text", "summary"), ("document", "summary"), ("article", "highlights"),
    ("inputs", "targets"), ("prompt", "response"), ("prompt", "completion"),
)  # fmt: skip
_SOURCES = tuple(dict.fromkeys(source for source, _ in PAIRS))
_KNOWN = "{input, output}, {source, target}, {text, summary}"


@dataclass(frozen=True)
class Pair:
    """A text and what it is to become; target None: it is to be found."""

    source: str
    target: str | None


def read_pair(
    row: Any, where: str, names: FieldNames | None = None, seen: Counter[str] | None = None, *, question: bool = False
) -> Pair:
    """Return one row as a pair. question: the target is asked for, and need not be there; a row may be a text alone.

    Raises UserError for a row that is malformed, of no known shape, or that has a field which is not read.
    """
    if question and isinstance(row, str):
        row = {"input": row}
    if question and isinstance(row, dict) and "prompt" in row and not any(name in row for name in _SOURCES):
        row = {("input" if name == "prompt" else name): value for name, value in row.items()}
    if not isinstance(row, dict) or not row:
        kind = "an empty object" if row == {} else f"a JSON {json_type(row)}"
        raise UserError(f"{where}: a row must be an object with fields, this is {kind}", "write each row as an object")
    fields = Fields(row, where, "", names or FieldNames(), Counter() if seen is None else seen)
    if {"instruction", "input"} <= row.keys() and not (names and names.columns):
        said = f"{where}: has an instruction and an input, and an encoder-decoder reads one source"
        raise UserError(said, "write both into one field, as {source, target}")
    found = [pair for pair in PAIRS if pair[0] in fields and pair[1] in fields]
    if question and not found:
        found = [(name, "") for name in _SOURCES if name in fields]
    if len(found) != 1:
        what = f"no known shape (fields {names_of(row)})"
        if found:
            what = f"two shapes ({' and '.join('{' + ', '.join(filter(None, pair)) + '}' for pair in found)})"
        raise UserError(f"{where}: the row has {what}; known shapes: {_KNOWN}", "--columns maps other names")
    texts = [_text(fields.take(name), where, name) if name else None for name in found[0]]
    fields.finish(text for text in texts if text is not None)
    return Pair(texts[0] or "", texts[1])


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        what = "is empty" if value is None or isinstance(value, str) else f"is a JSON {json_type(value)}"
        raise UserError(f"{where}: {name} {what}", "it must be a text with something in it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name} has half of a surrogate pair", "fix its encoding") from None
    return value


_LANGUAGES = {"src_lang": "sources", "tgt_lang": "targets"}


@dataclass(frozen=True)
class PairRows:
    """How rows become documents of a source and a target, the same for training and generation. It can be pickled.

    sides   lengths and the decoder's first token
    prefix  stands before every source, as "summarize: " (T5)
    """

    opened: OpenedTokenizer
    sides: Sides
    prefix: str = ""

    @property
    def tokenizer(self) -> Any:
        return self.opened.tokenizer

    @property
    def notes(self) -> tuple[str, ...]:
        return self.opened.notes

    @property
    def description(self) -> str:
        source, target = (
            f" ({self._language(name)})" if self._has_languages else "" for name in ("src_lang", "tgt_lang")
        )
        behind = f", each source behind {self.prefix!r}" if self.prefix else ""
        return f"pairs of source{source} and target{target}{behind}"

    @property
    def end_token_id(self) -> int:
        """Any token, to fill rows with."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint carries of it."""
        return {"source_prefix": self.prefix}

    def identity(self) -> str:
        """Return a hash of how a pair is read."""
        languages = [getattr(self.tokenizer, name, None) for name in _LANGUAGES] if self._has_languages else []
        said = json.dumps([self.prefix, self.sides.source_length, self.sides.start_token_id, *languages])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def write(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder. Raises UserError."""
        write_tokenizer(self.opened.folder, folder)

    def encoder(self, settings: EncodeSettings) -> PairEncoder:
        """Return what encodes chunks of rows. Raises UserError for settings that mean nothing here."""
        return PairEncoder(self, settings)

    def source(self, text: str) -> list[int]:
        """Return the tokens of a source, with its prefix, in the tokenizer's language of sources where it has such."""
        if self._has_languages:
            self.tokenizer._switch_to_input_mode()
        return self._backend.encode(self.prefix + text).ids

    def target(self, text: str) -> list[int]:
        """Return the tokens of a target, in the tokenizer's language of targets where it has such."""
        if self._has_languages:
            self._language("tgt_lang")
            self.tokenizer._switch_to_target_mode()
        return self._backend.encode(text).ids

    @property
    def _has_languages(self) -> bool:
        """Whether the tokenizer sets tokens of languages around texts (NLLB, mBART), as transformers' text_target."""
        return hasattr(type(self.tokenizer), "src_lang")  # the switches below stand in transformers 4's base class too

    def _language(self, field: str) -> str:
        """Return a language of the tokenizer. Raises UserError where it has none, or not such a token."""
        found = getattr(self.tokenizer, field, None)
        if found is None or self.tokenizer.convert_tokens_to_ids(found) in (None, self.tokenizer.unk_token_id):
            what = "does not say" if found is None else f"has no token for {found!r},"
            raise UserError(
                f"{self.opened.folder}: its tokenizer {what} {field}, the language of {_LANGUAGES[field]}",
                'write src_lang and tgt_lang into tokenizer_config.json, such as "eng_Latn" and "deu_Latn"',
            )
        return found

    @property
    def _backend(self) -> Any:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{self.opened.folder}: its tokenizer has no fast version, which pairs are read with",
                "take a folder with tokenizer.json",
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # one that a text writes is text
        return backend

    @cached_property
    def special_at_end(self) -> int:
        """How many special tokens the tokenizer sets behind a text."""
        mask = self._backend.encode("a").special_tokens_mask
        return len(mask) - 1 - max(i for i, special in enumerate(mask) if not special)


@dataclass(frozen=True)
class PairEncoder:
    """Turns chunks of rows into documents, as data.encode.Encoder does for conversations."""

    rows: PairRows
    settings: EncodeSettings

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("on_long_row", self.settings.on_long_row, ("error", "skip", "truncate")),
            ("train_on", self.settings.train_on, ("all",)),
        ):
            if value not in allowed:
                raise UserError(f"{flag} {value} means nothing for SEQ_2_SEQ_LM", f"give {' or '.join(allowed)}")

    def encode(self, chunk: Chunk) -> tuple[Documents, Report]:
        """Return the documents of a chunk, in order, and the report. Raises readers.NotLines."""
        report = Report()
        documents: list[Sample] = []
        numbers: list[int] = []
        for number, row in enumerate(chunk.parse(), chunk.first):
            report.rows += 1
            where = f"{chunk.path} row {number}"
            try:
                pair = read_pair(row, where, self.settings.names, report.seen)
                source, target = self.rows.source(pair.source), self.rows.target(pair.target or "")
                sample = self._fitting(source, target, where, report)
            except UserError as error:
                report.problem(where, str(error).removeprefix(where).removeprefix(":").strip())
                continue
            if sample is not None:
                documents.append(sample)
                numbers.append(number)
        encoded = Documents.of(documents, numbers)
        report.top = int(encoded.ids.max()) if len(encoded) else 0
        return encoded, report

    def _fitting(self, source: list[int], target: list[int], where: str, report: Report) -> Sample | None:
        """Return the document of a row, or what on_long_row makes of it."""
        before = self.settings.before
        limits = self.rows.sides.source_length - before, self.settings.seq_length
        report.length(max(before + len(source), len(target)), where)
        sides = (("source", source, "source_length", limits[0], before), ("target", target, "seq_length", limits[1], 0))
        for side, ids, flag, limit, more in sides:
            if len(ids) <= limit:
                continue
            total = len(ids) + more
            reason = f"too long, the {side} has {total} tokens for --{flag} {limit + more}"
            if self.settings.on_long_row == "error":
                remedy = f"raise --{flag} to at least {total}, or say what becomes of it with --on_long_row"
                raise UserError(reason, f"{remedy} truncate or skip")
            if self.settings.on_long_row == "skip":
                report.problem(where, reason, wanted=True)
                return None
        if len(source) > limits[0] or len(target) > limits[1]:
            report.seen["long truncated"] += 1
        # A source keeps the special tokens at its end; a target that is cut has none: a reply does not end there.
        end = self.rows.special_at_end
        if len(source) > limits[0]:
            source = source[: limits[0] - end] + source[len(source) - end :]
        tokens = np.array(source + target[: limits[1]], dtype=np.int32)
        labels = np.where(np.arange(len(tokens)) >= len(source), tokens, IGNORE).astype(np.int32)
        return Sample(tokens, labels)
