"""Classification: rows with labels -> token ids and classes, for TOKEN_CLS and SEQ_CLS.

Words are cut into pieces by the tokenizer, as transformers does with is_split_into_words: the first piece of a word has
its class, all others -100. The class of a text stands at the token that the head reads: the first of an encoder, the
last of a decoder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..added_tokens import entries_of
from ..errors import UserError
from ..files import read_json, write_file
from .documents import CLASSES, Documents
from .encode import EncodeSettings
from .fields import FieldNames
from .labelled import PAGE, Box, Label, LabelledText, TaggedWords, read_labelled, read_tagged
from .pieces import IGNORE, Sample
from .readers import Chunk, parse_sources, read_rows
from .report import Report, reason_of
from .tokenizer import OpenedTokenizer

READS = {"TOKEN_CLS": read_tagged, "SEQ_CLS": read_labelled}  # how a row is read, by task
WHAT = {"TOKEN_CLS": "token classification", "SEQ_CLS": "text classification"}
TOKEN_TYPES = "token_types"  # the column of which text of a pair a token is of
BOXES = "boxes"  # the column of where a token stands on its page
BOX_AT_END = (PAGE, PAGE, PAGE, PAGE)  # of special tokens behind a text; of those before it 0, as transformers has it
_MOST_LABELS = 4096


def reader(task: str, columns: Sequence[str]) -> Callable[..., TaggedWords | LabelledText]:
    """Return how a row of a task is read for a model that reads these columns."""
    read: Callable[..., TaggedWords | LabelledText] = READS[task]
    return partial(read, boxed=True) if BOXES in columns else read


@dataclass(frozen=True)
class ClassRows:
    """How rows with labels become documents, the same for training and for prediction. It can be pickled.

    task      TOKEN_CLS or SEQ_CLS
    labels    names of the classes, in order
    last      the class of a text stands at its last token (decoders), else at its first
    columns   what else the model reads of each token: token_types, boxes
    """

    opened: OpenedTokenizer
    task: str
    labels: tuple[str, ...]
    last: bool = True
    columns: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Any:
        return self.opened.tokenizer

    @property
    def read(self) -> Callable[..., TaggedWords | LabelledText]:
        """Reads a row, as `labelled.read_tagged` does."""
        return reader(self.task, self.columns)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.opened.notes

    @property
    def description(self) -> str:
        shown = ", ".join(self.labels[:8]) + (", ..." if len(self.labels) > 8 else "")
        return f"{WHAT[self.task]} with {len(self.labels)} labels: {shown}"

    @property
    def end_token_id(self) -> int:
        """Any token, to fill rows with."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint carries of it."""
        added = {"added_tokens": entries_of(self.opened.added)} if self.opened.added else {}
        return {"labels": list(self.labels), **added}

    def identity(self) -> str:
        """Return a hash of the task and its labels."""
        said = json.dumps([self.task, self.labels, self.last, self.columns])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def write(self, folder: str | Path) -> None:
        """Write the tokenizer's files, and a config.json with the labels, into a folder. Raises UserError.

        With that config transformers builds the head of the adapter's size: AutoConfig.from_pretrained(folder).
        """
        self.opened.write(folder)
        write_labels(self.opened.folder, folder, self.labels)

    def encoder(self, settings: EncodeSettings) -> ClassEncoder:
        """Return what encodes chunks of rows. Raises UserError for settings that mean nothing here."""
        return ClassEncoder(self, settings)


@dataclass(frozen=True)
class ClassEncoder:
    """Turns chunks of rows into documents, as data.encode.Encoder does for conversations."""

    rows: ClassRows
    settings: EncodeSettings

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("on_long_row", self.settings.on_long_row, ("error", "skip", "truncate")),
            ("train_on", self.settings.train_on, ("all",)),
        ):
            if value not in allowed:
                raise UserError(f"{flag} {value} means nothing for {self.rows.task}", f"give {' or '.join(allowed)}")
        if getattr(self.rows.tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"{self.rows.opened.folder}: its tokenizer has no fast version, which tells what word a token is of",
                "take a folder with tokenizer.json",
            )

    def encode(self, chunk: Chunk) -> tuple[Documents, Report]:
        """Return the documents of a chunk, in order, and the report. Raises readers.NotLines."""
        report, read = Report(), self.rows.read
        documents: list[Sample] = []
        numbers: list[int] = []
        for number, row in enumerate(chunk.parse(), chunk.first):
            report.rows += 1
            where = f"{chunk.path} row {number}"
            try:
                sample = self.sample(read(row, where, self.settings.names, report.seen), where)
                sample = self._fitting(sample, where, report)
            except UserError as error:
                report.problem(where, reason_of(error, where))
                continue
            if sample is not None:
                documents.append(sample)
                numbers.append(number)
        encoded = Documents.of(documents, numbers)
        report.top = int(encoded.ids.max()) if len(encoded) else 0
        return encoded, report

    def sample(self, row: TaggedWords | LabelledText, where: str) -> Sample:
        """Return the tokens and classes of one row; classes of a row without labels are 0 where one is asked for.

        Raises UserError for a label that is none of the task's, and a word without tokens.
        """
        if isinstance(row, TaggedWords):
            encoding = self._words(row)
            marks = _first_pieces(encoding.word_ids)
            found = {word for word in encoding.word_ids if word is not None}
            for number, word in enumerate(row.words):
                if number not in found:
                    raise UserError(
                        f"{where}: token {number} ({word.text!r}) has no piece in the tokenizer", "remove it"
                    )
            given = row.tags
        else:
            encoding = self._backend.encode(row.text, row.second)
            marks = {len(encoding.ids) - 1 if self.rows.last else 0: 0}
            given = None if row.label is None else (row.label,)
        classes = np.full(len(encoding.ids), IGNORE, dtype=np.int32)
        for place, number in marks.items():
            classes[place] = 0 if given is None else self._class(given[number], where)
        ids = np.array(encoding.ids, dtype=np.int32)
        columns = {CLASSES: classes}
        if TOKEN_TYPES in self.rows.columns:
            columns[TOKEN_TYPES] = np.array(encoding.type_ids, dtype=np.int32)
        if BOXES in self.rows.columns:
            assert isinstance(row, TaggedWords) and row.boxes is not None
            columns[BOXES] = _boxes_of(encoding.word_ids, row.boxes)
        return Sample(ids, np.full(len(ids), IGNORE, dtype=np.int32), columns)

    def _fitting(self, sample: Sample, where: str, report: Report) -> Sample | None:
        """Return the document of a row, or what on_long_row makes of it."""
        longest, length = self.settings.seq_length, len(sample.input_ids)
        report.length(length, where)
        if length <= longest:
            return sample
        reason = f"too long, {length} tokens for --seq_length {longest}"
        if self.settings.on_long_row == "error":
            remedy = f"raise --seq_length to at least {length}, or say what becomes of it with --on_long_row"
            raise UserError(reason, f"{remedy} truncate or skip")
        if self.settings.on_long_row == "skip":
            report.problem(where, reason, wanted=True)
            return None
        report.seen["long truncated"] += 1
        return truncated(sample, longest, self._special_at_end)

    @property
    def _backend(self) -> Any:
        backend = self.rows.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # one that a text writes is text
        return backend

    def _words(self, row: TaggedWords) -> Any:
        words = [f" {word.text}" if word.spaced and self._spaces_words else word.text for word in row.words]
        return self._backend.encode(words, is_pretokenized=True)

    @cached_property
    def _spaces_words(self) -> bool:
        """Whether the space before a word is a part of its first token: a byte-level vocabulary."""
        pre_tokenizer = json.loads(self.rows.tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer")
        return "ByteLevel" in json.dumps(pre_tokenizer)

    @cached_property
    def _special_at_end(self) -> int:
        """How many special tokens the tokenizer sets behind a text."""
        mask = self._backend.encode("a").special_tokens_mask
        return len(mask) - 1 - max(i for i, special in enumerate(mask) if not special)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.rows.labels)}

    def _class(self, label: Label, where: str) -> int:
        labels = self.rows.labels
        number = label if isinstance(label, int) else self._numbers.get(label)
        if number is None or not 0 <= number < len(labels):
            known = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
            raise UserError(f"{where}: label {label!r} is none of the {len(labels)} labels ({known})", "correct it")
        return number


def truncated(sample: Sample, length: int, special: int) -> Sample:
    """Return the first tokens of a document with the `special` ones at its end: `length` in all.

    The class of its last token, where it has one, stays that of the last.
    """
    kept = np.r_[0 : length - special, len(sample.input_ids) - special : len(sample.input_ids)]
    columns = {name: column[kept] for name, column in sample.columns.items()}
    last = sample.columns[CLASSES][-1]
    if last != IGNORE:
        columns[CLASSES][-1] = last
    if (columns[CLASSES] == IGNORE).all():
        raise UserError(f"no label is left in its first {length} tokens", "raise --seq_length")
    return Sample(sample.input_ids[kept], sample.labels[kept], columns)


def _boxes_of(word_ids: Sequence[int | None], boxes: Sequence[Box]) -> np.ndarray:
    """Return the box of each token [T, 4] int32: its word's; of special tokens the page's corners."""
    found, inside = [], False
    for word in word_ids:
        inside = inside or word is not None
        found.append(boxes[word] if word is not None else BOX_AT_END if inside else (0, 0, 0, 0))
    return np.array(found, dtype=np.int32)


def _first_pieces(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Return the place of the first token of each word -> the word."""
    before, found = None, {}
    for place, word in enumerate(word_ids):
        if word is not None and word != before:
            found[place] = word
        before = word
    return found


# ---- the labels of a task ----


def write_labels(model: str | Path, folder: str | Path, labels: Sequence[str]) -> None:
    """Write the config.json of `model` into a folder, with these labels. Raises UserError where it cannot be read."""
    config = read_json(Path(model) / "config.json")
    config |= {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    config.pop("num_labels", None)
    write_file(Path(folder) / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def choose_labels(
    task: str, model_path: str | Path, data_path: str | Path, names: FieldNames, columns: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the names of the classes, in order: those of the model's config.json where it names them, else the data's.

    columns  what the model reads of each token
    Names of the data are sorted; numbers 0 to n are named LABEL_0 to LABEL_n, as transformers does.
    Raises UserError for labels that cannot be used.
    """
    where = Path(model_path) / "config.json"
    config = read_json(where)
    problem = config.get("problem_type")
    if problem not in (None, "single_label_classification"):
        raise UserError(
            f"{where}: problem_type {problem} is not implemented", "give each text one label, and remove the field"
        )
    named = labels_of(config, str(where))
    return named or _labels_of_rows(task, data_path, names, columns)


def labels_of(config: Any, where: str, defaults: bool = False) -> tuple[str, ...]:
    """Return the labels that a config.json names in `id2label`; none where they are missing.

    defaults  names that are transformers' own, LABEL_0 and so on, are labels too
    """
    named = config.get("id2label")
    if not isinstance(named, dict) or not named:
        return ()
    labels = tuple(named.get(str(i)) for i in range(len(named)))
    if any(not isinstance(label, str) for label in labels) or len(set(labels)) != len(labels):
        raise UserError(f"{where}: id2label must name classes 0 to {len(named) - 1}, each differently", "correct it")
    return () if labels == default_names(len(labels)) and not defaults else labels


def default_names(count: int) -> tuple[str, ...]:
    """Return transformers' names of classes that have none."""
    return tuple(f"LABEL_{i}" for i in range(count))


def _labels_of_rows(
    task: str, data_path: str | Path, names: FieldNames, columns: Sequence[str]
) -> tuple[str, ...]:
    found: set[Label] = set()
    read, wrong = reader(task, columns), None
    for source in parse_sources(str(data_path)):
        for number, row in enumerate(read_rows(source.path)):
            try:
                found.update(read(row, f"{source.path} row {number}", names).labels)
            except UserError as error:  # counted, and told, when the rows are encoded
                wrong = wrong or error
    if wrong is not None and not found:
        raise wrong
    numbers = {label for label in found if isinstance(label, int)}
    if numbers and numbers != found:
        raise UserError(f"data_path {data_path}: some labels are names and some are numbers", "keep one kind")
    if numbers and min(numbers) < 0:
        raise UserError(f"data_path {data_path}: label {min(numbers)} is below 0", "number the labels from 0")
    count = max(numbers) + 1 if numbers else len(found)
    if not 2 <= count <= _MOST_LABELS:
        raise UserError(
            f"data_path {data_path}: its rows have {count} label{'s' * (count != 1)}; {WHAT[task]} needs "
            f"2 to {_MOST_LABELS}",
            "look at the rows, or at --columns",
        )
    return default_names(count) if numbers else tuple(sorted(str(label) for label in found))

