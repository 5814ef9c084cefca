"""Preview, top to bottom: tokenizer and template, the rows as the run would see them, counts and lengths.

megalora data --model_path DIR --data_path rows.json --row 5
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.text import Text

from megalora.data import ChatTemplate, Rendering
from megalora.data.dataset import encode_row, scan
from megalora.data.documents import CLASSES, Documents
from megalora.data.pieces import IGNORE, Sample
from megalora.data.readers import parse_sources
from megalora.data.report import Report
from megalora.data.tokenizer import new_tokens, open_tokenizer
from megalora.errors import UserError
from megalora.files import read_json
from megalora.flags import DataArguments, Preview
from megalora.models.config import is_encoder_decoder, read_config, reads_images
from megalora.parallel.mesh import Axis
from megalora.rows import data_settings, rendering, template_options

Flag = TypeVar("Flag", bool, float)  # whether a token is trained, or what its label counts for
_UNFINISHED = "\ufffd"  # what decoding gives for bytes that are no whole character
_BAR = 50  # characters of the longest bar of the histogram
_BUCKETS = 12
# Styles of neighbouring tokens alternate, so that their borders are seen.
_TRAINED, _CONTEXT = ("black on green", "black on bright_green"), ("default", "dim")


def preview(arguments: Preview) -> None:
    """Show rows as the run would see them, and count all of them. Raises UserError as the run would for bad rows."""
    shown, data = arguments.shown, arguments.data
    template = _rendering(shown.model_path, data)
    settings, printer = data_settings(data), _Printer(template.tokenizer, sys.stdout)
    kind = "chat template" if isinstance(template, ChatTemplate) else "rows"
    printer.line(f"{kind}: {template.description} ({template.identity()})")
    for note in template.notes:
        printer.line(note)
    if shown.row is not None:
        printer.row(shown.row, encode_row(data.data_path, template, settings, shown.row))
        return
    counts, report = _Counts(), Report()
    for documents, part in scan(data.data_path, template, settings):
        for row, samples in _by_row(documents, range(shown.rows)):
            printer.row(row, samples)
        counts.add(documents)
        report.add(part)
    for line in (*counts.lines(report), *_of_weights(data.data_path), *report.notes()):
        printer.line(line)
    report.check_names(settings.names)
    report.check_rows(settings.on_bad_row)


def _of_weights(data_path: str) -> list[str]:
    """Return a line where weights of files make a run use rows more or less often than they are counted."""
    told = [f"{one.path} x {float(one.weight):g}" for one in parse_sources(data_path) if one.weight != 1]
    if not told:
        return []
    return [f"each row is counted once here; a run uses them as often as weights say: {', '.join(told)}"]


def _rendering(model_path: str, data: DataArguments) -> Rendering:
    """Return how rows become documents; the folder may be of a tokenizer alone, which then has a chat template."""
    file = Path(model_path) / "config.json"
    added = new_tokens(model_path, data.new_special_tokens) if data.new_special_tokens else ()
    raw = read_json(file) if file.is_file() else {}
    if is_encoder_decoder(raw) or reads_images(raw):
        config = read_config(model_path)
        return rendering(config.tasks[0], config, model_path, data, (), Axis(), added)
    for name in ("source_length", "source_prefix"):
        if getattr(data, name) is not None:
            raise UserError(f"{name} has no effect: {model_path} is no encoder-decoder", "leave it out")
    return ChatTemplate.of(open_tokenizer(model_path, added), data.template, template_options(data))


def _by_row(documents: Documents, wanted: range) -> Iterator[tuple[int, list[Sample]]]:
    """Yield the documents of the rows that are wanted, row by row."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(documents.rows.tolist()):
        if row in wanted:
            places.setdefault(row, []).append(place)
    for row, theirs in places.items():
        yield row, [documents.sample(place) for place in theirs]


@dataclass
class _Counts:
    """Documents, tokens and lengths of what has been read."""

    documents: int = 0
    tokens: int = 0
    trained: int = 0
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, documents: Documents) -> None:
        self.documents += len(documents)
        self.tokens += int(documents.lengths.sum())
        self.trained += int(documents.label_counts.sum())
        self.lengths.update(documents.lengths.tolist())

    def lines(self, report: Report) -> list[str]:
        """Return counts, and a histogram of the lengths."""
        share = self.trained / self.tokens if self.tokens else 0.0
        lines = [
            "",
            f"{report.rows:,} rows, {report.left_out:,} of them left out; {self.documents:,} documents",
            f"{self.tokens:,} tokens, {self.trained:,} of them trained ({share:.1%})",
        ]
        if self.lengths:
            lines += [report.lengths_line(), "", "tokens of a document", *self._histogram()]
        return lines

    def _histogram(self) -> list[str]:
        longest = max(self.lengths)
        width = max(1, -(-longest // _BUCKETS))
        counted: Counter[int] = Counter()
        for length, count in self.lengths.items():
            counted[(length - 1) // width] += count
        most, lines = max(counted.values()), []
        for bucket in range(max(counted) + 1):
            bar = "#" * -(-_BAR * counted[bucket] // most)
            lines.append(
                f"{bucket * width + 1:>8,} to {(bucket + 1) * width:>8,}  {counted[bucket]:>9,}  {bar}".rstrip()
            )
        return lines


class _Printer:
    """Writes documents: coloured on a terminal, elsewhere each run of tokens behind `train`, its weight or `-`."""

    def __init__(self, tokenizer: Any, file: TextIO):
        self._tokenizer = tokenizer
        self._coloured = file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._console = Console(file=file, highlight=False, soft_wrap=True, force_terminal=self._coloured)

    def line(self, text: str) -> None:
        self._console.print(Text(_printable(text)))

    def row(self, row: int, samples: Sequence[Sample]) -> None:
        """Write the documents of a row."""
        for place, sample in enumerate(samples, 1):
            self._document(f"row {row}" + (f", document {place} of {len(samples)}" if len(samples) > 1 else ""), sample)

    def _document(self, name: str, sample: Sample) -> None:
        labelled = sample.labels != IGNORE
        if CLASSES not in sample.columns:
            labelled[:1] = False  # there is nothing to predict it from
        self.line(f"\n{name}: {len(sample.input_ids):,} tokens, {int(labelled.sum()):,} of them trained")
        weights = (labelled.astype(float) if sample.weights is None else sample.weights * labelled).tolist()
        pieces = list(token_texts(self._tokenizer, sample.input_ids.tolist(), weights))
        if self._coloured:
            text = Text()
            before = 1.0
            for number, (piece, weight) in enumerate(pieces):
                if weight not in (0, before):
                    text.append(f"[x {weight:g}]", "bold")
                before = weight or before
                text.append(_printable(piece), (_TRAINED if weight else _CONTEXT)[number % 2])
            self._console.print(text)
            return
        for weight, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
            mark = "    -" if weight == 0 else "train" if weight == 1 else f"x {weight:<3g}"
            for line in _printable("".join(text for text, _ in run)).split("\n"):
                self._console.print(Text(f"{mark} | {line}"))


def token_texts(tokenizer: Any, ids: Sequence[int], flags: Sequence[Flag]) -> Iterator[tuple[str, Flag]]:
    """Yield the text of each token, or of a few that make one character, and its flag."""

    def decode(some: Sequence[int]) -> str:
        return tokenizer.decode(list(some), clean_up_tokenization_spaces=False)

    before, start = 0, 0
    for stop in range(1, len(ids) + 1):
        last = stop == len(ids) or flags[stop] != flags[start]
        known, text = decode(ids[before:start]), decode(ids[before:stop])
        text = text[len(known) :] if text.startswith(known) else decode(ids[start:stop])
        if last or not text.endswith(_UNFINISHED):
            yield text, flags[start]
            before, start = start, stop


def _printable(text: str) -> str:
    """Return the text without characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
