"""Rows with an image each: a text, or a source and a target, behind the tokens of the image.

The image is the row's field `image`, or `images` with one in it: a path, absolute or relative to the file of the rows.
Everything else of the row is read as that of a row without one. The image's tokens stand before all others, those that
begin a text too, as transformers' Blip2Processor sets them; none of them is a label.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import read_json, write_file
from ..pictures import Picture, check_pillow, find_picture
from .documents import Documents
from .encode import Encoder, EncodeSettings
from .fields import FieldNames, empty, json_type
from .packing import Sides
from .pairs import PairRows
from .pieces import IGNORE, Sample
from .readers import Chunk
from .report import Report, reason_of
from .template import ChatTemplate

FIELDS = ("image", "images")
MARK = "<image>"  # how other programs write the place of an image into a text
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # transformers 4, and 5


@dataclass(frozen=True)
class ImageRows:
    """How rows with an image become documents, the same for training and generation. It can be pickled.

    rows         how the rest of a row is read
    tokens       that an image takes, and the id that stands in their places
    processing   fields of the model's image processor
    """

    rows: ChatTemplate | PairRows
    tokens: int
    placeholder: int
    processing: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_pillow("a model that reads images")

    @property
    def tokenizer(self) -> Any:
        return self.rows.tokenizer

    @property
    def notes(self) -> tuple[str, ...]:
        return self.rows.notes

    @property
    def description(self) -> str:
        return f"{self.rows.description}, behind {self.tokens} tokens of an image"

    @property
    def end_token_id(self) -> int:
        return self.rows.end_token_id

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint carries of it."""
        return self.rows.record

    @property
    def sides(self) -> Sides | None:
        """Of an encoder-decoder, whose sources have the images."""
        return self.rows.sides if isinstance(self.rows, PairRows) else None

    def identity(self) -> str:
        """Return a hash of how a row and its image are read."""
        said = [self.rows.identity(), self.tokens, self.placeholder, dict(self.processing)]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, folder: str | Path) -> None:
        """Write the tokenizer's files, and that of the image processor, into a folder. Raises UserError."""
        self.rows.write(folder)
        write_file(Path(folder) / PROCESSORS[0], (json.dumps(dict(self.processing), indent=2) + "\n").encode())

    def encoder(self, settings: EncodeSettings) -> ImageEncoder:
        """Return what encodes chunks of rows. Raises UserError for settings that mean nothing here."""
        limit, flag = settings.seq_length, "seq_length"
        if self.sides is not None:
            limit, flag = self.sides.source_length, "source_length"
        if limit <= self.tokens:
            raise UserError(
                f"{flag} ({limit}) leaves no room for a text: an image takes {self.tokens} tokens", f"raise {flag}"
            )
        settings = replace(settings, before=self.tokens)
        rows = self.rows
        inner = Encoder(rows, settings) if isinstance(rows, ChatTemplate) else rows.encoder(settings)
        return ImageEncoder(self, inner, settings.names)


@dataclass(frozen=True)
class ImageEncoder:
    """Turns chunks of rows into documents with images. inner: encodes the rest of each row."""

    rows: ImageRows
    inner: Any
    names: FieldNames

    def encode(self, chunk: Chunk) -> tuple[Documents, Report]:
        """Return the documents of a chunk, in order, and the report. Raises readers.NotLines."""
        report, samples, numbers = Report(), list[Sample](), list[int]()
        for number, row in enumerate(chunk.parse(), chunk.first):
            where, seen = f"{chunk.path} row {number}", Counter[str]()
            try:
                path, rest = take_image(row, where, self.names, seen)
                picture = find_picture(path, self.rows.tokens)
            except UserError as error:
                report.rows += 1
                report.problem(where, reason_of(error, where))
                continue
            documents, part = self.inner.encode(Chunk(chunk.path, number, [rest]))
            part.seen += seen
            report.add(part)
            samples += self._behind(documents, picture)
            numbers += [number] * len(documents)
        encoded = Documents.of(samples, numbers)
        report.top = int(encoded.ids.max()) if len(encoded) else 0
        return encoded, report

    def _behind(self, documents: Documents, picture: Picture) -> Iterator[Sample]:
        count, ours = picture.tokens, np.int32
        for sample in map(documents.sample, range(len(documents))):
            ids = np.concatenate((np.full(count, self.rows.placeholder, ours), sample.input_ids))
            labels = np.concatenate((np.full(count, IGNORE, ours), sample.labels))
            weights = sample.weights
            if weights is not None:
                weights = np.concatenate((np.zeros(count, np.float32), weights))
            yield Sample(ids, labels, weights=weights, picture=picture)


def take_image(row: Any, where: str, names: FieldNames, seen: Counter[str]) -> tuple[Path, dict[str, Any]]:
    """Return (the file of a row's image, the row without it). Raises UserError where it has none, or several.

    seen  counts the user's names of the field that were met
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: the row is a JSON {json_type(row)}", "make it an object with fields")
    found, rest = [], {}
    for name, value in row.items():
        ours = name if name in names.ignored else names.columns.get(name, name)
        if name in names.ignored or ours not in FIELDS:
            rest[name] = value
            continue
        if name != ours:
            seen[f"column {name}"] += 1
        found += [] if empty(value) else value if isinstance(value, list) else [value]
    if len(found) != 1:
        what = f"has {len(found)} images" if found else "has no image"
        raise UserError(f"{where}: {what}, and this model reads one before each text", "name its file in image")
    if not isinstance(found[0], str):
        raise UserError(f"{where}: image is a JSON {json_type(found[0])}", "name its file")
    if marked(rest):
        raise UserError(
            f"{where}: a text has {MARK}, and the image stands before the text in any case", f"take {MARK} out of it"
        )
    return Path(where.rpartition(" row ")[0]).parent / found[0], rest


def marked(value: Any) -> bool:
    """Return whether a text in it has MARK."""
    if isinstance(value, dict):
        return any(map(marked, value.values()))
    return any(map(marked, value)) if isinstance(value, list) else isinstance(value, str) and MARK in value


def read_processing(folder: str | Path) -> dict[str, Any]:
    """Return the fields of the image processor in a model's folder. Raises UserError where it has none."""
    for name in PROCESSORS:
        if (Path(folder) / name).is_file():
            fields = read_json(Path(folder) / name)
            inner = fields.get("image_processor", fields)
            if isinstance(inner, dict):
                return {key: value for key, value in inner.items() if key != "auto_map"}
    raise UserError(
        f"model_path {folder}: has no {PROCESSORS[0]}, which says how images are read",
        "copy it from the model's own folder",
    )


