"""Data set: data files -> packed rows, with every row that cannot be used counted.

The rows are rendered and tokenised once, by worker processes where there are many, and written to a cache of mapped
files (see cache.py). All ranks of a node, and later runs, read that.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers
import transformers

from ..errors import UserError
from .cache import Writer, cached, file_digest, known_digest, load_arrays, locked, open_documents, save_arrays
from .classes import ClassRows
from .conversation import TrainOn
from .documents import Documents
from .encode import Encoder, EncodeSettings, OnLongRow
from .fields import FieldNames
from .images import ImageRows
from .packing import PackedRows, Sides, lay_out, pack_arrays, pack_sides
from .pairs import PairRows
from .pieces import Sample
from .readers import Chunk, NotLines, Source, dataset_fingerprint, parse_sources, read_chunks, read_rows
from .report import Report, message_and_hint
from .sampler import EVALUATION_EPOCH, PACKING_EPOCH, SOURCE_EPOCH, permutation
from .template import ChatTemplate
from .workers import encode_all

Rendering = ChatTemplate | ClassRows | PairRows | ImageRows  # how rows become documents


class Encodes(Protocol):
    """Turns chunks of rows into documents. It can be pickled."""

    def encode(self, chunk: Chunk) -> tuple[Documents, Report]: ...


def encoder_of(rendering: Rendering, settings: EncodeSettings) -> Encodes:
    """Return what encodes the rows of a run."""
    return Encoder(rendering, settings) if isinstance(rendering, ChatTemplate) else rendering.encoder(settings)


_INLINE = 4  # chunks that are encoded here before worker processes are worth their start


OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True)
class DataSettings:
    """How rows become packed rows; the flags of the same names.

    data_cache  folder of the tokens; None: a temporary one, of this process alone
    processes   worker processes; None: one a core that this process may use
    check_names whether a name of `names` that no row has is an error
    """

    seq_length: int
    packing: bool = True
    on_bad_row: OnBadRow = "error"
    on_long_row: OnLongRow = "error"
    train_on: TrainOn = "all"
    names: FieldNames = field(default_factory=FieldNames)
    max_rows: int | None = None
    data_cache: Path | None = None
    processes: int | None = None
    check_names: bool = True

    @property
    def encoding(self) -> EncodeSettings:
        return EncodeSettings(self.seq_length, self.on_long_row, self.train_on, self.names)


def load_dataset(data_path: str | Path, template: Rendering, settings: DataSettings, seed: int) -> PackedRows:
    """Return the rows of `data_path`, tokenised and packed in an order drawn from `seed`.

    A bad row is malformed, of an unknown shape, refused by the template, longer than seq_length (on_long_row "error"),
    or has no label. on_bad_row "error": UserError counting them by kind; "skip": they are left out and counted in
    `.notes`. UserError too where no row is left.
    """
    return load_split(data_path, template, settings, seed)[0]


def load_split(
    data_path: str | Path, template: Rendering, settings: DataSettings, seed: int, eval_fraction: float = 0.0
) -> tuple[PackedRows, PackedRows | None]:
    """Return the rows to train on and those held out for evaluation, a share `eval_fraction` of all, drawn by seed.

    All documents of a row are on the same side. None where eval_fraction is 0. See `load_dataset`.
    """
    sources = parse_sources(str(data_path))
    if settings.data_cache is None:
        with tempfile.TemporaryDirectory(prefix="megalora-data-") as folder:  # mapped files outlive their names
            return _load(sources, template, settings, seed, eval_fraction, Path(folder))
    return _load(sources, template, settings, seed, eval_fraction, Path(settings.data_cache))


def _load(
    sources: list[Source],
    template: Rendering,
    settings: DataSettings,
    seed: int,
    eval_fraction: float,
    root: Path,
) -> tuple[PackedRows, PackedRows | None]:
    started = time.monotonic()
    encoder = encoder_of(template, settings.encoding)
    folder, made, now = cached(
        root,
        _key(sources, template, settings, partial(known_digest, root)),
        lambda writer: _encode(sources, encoder, settings, writer),
    )
    documents, report = open_documents(folder), Report.from_json(made["report"])
    first_rows = made["first_rows"]
    if settings.data_cache is not None and not now:
        note = f"tokens of the rows are those of an earlier run, in {folder}"
    elif settings.data_cache is not None:
        note = f"tokens of the rows are kept in {folder}, made in {time.monotonic() - started:.0f} s"
    notes = (*report.notes(), *([note] if settings.data_cache is not None else []))
    chosen, held = _chosen(documents, sources, first_rows, seed, eval_fraction)
    identity = [[str(source.weight) for source in sources], str(eval_fraction), seed if held is not None else None]
    plain = held is None and all(source.weight == 1 for source in sources)
    parts: list[PackedRows | None] = []
    for name, members in (("train", chosen), ("eval", held)):
        if members is None:
            parts.append(None)
            continue
        sides = template.sides if isinstance(template, PairRows | ImageRows) else None
        order, ends = _layout(folder, name, documents, members, settings, seed, identity, sides)
        rows = lay_out(documents, order, ends, settings.seq_length, template.end_token_id, report.top, sides)
        # Any id does as padding: no document attends to it, and it has no label. The tokenizer's own for it may have
        # no row in the embedding, where it was added to a model that came without one.
        fingerprint = made["fingerprint"]
        if not plain:
            fingerprint = hashlib.sha256(json.dumps([fingerprint, name, identity]).encode()).hexdigest()
        parts.append(replace(rows, fingerprint=fingerprint, skipped=report.left_out))
    return replace(parts[0], notes=notes), parts[1]


def scan(data_path: str | Path, template: Rendering, settings: DataSettings) -> Iterator[tuple[Documents, Report]]:
    """Yield the documents and the report of each chunk of rows, in order, as a run would have them; keep nothing.

    Rows are numbered over all sources. Raises UserError for what cannot be read.
    """
    encoder, first = encoder_of(template, settings.encoding), 0
    for source in parse_sources(str(data_path)):
        read = 0
        for documents, report in _encoded(source.path, encoder, settings):
            yield replace(documents, rows=documents.rows + first), report
            read += report.rows
        first += read


def encode_row(data_path: str | Path, template: Rendering, settings: DataSettings, row: int) -> list[Sample]:
    """Return the documents of one row, numbered over all sources. Raises UserError where it is bad or not there."""
    first = 0
    for source in parse_sources(str(data_path)):
        for number, value in enumerate(islice(read_rows(source.path), settings.max_rows)):
            if first + number == row:
                chunk = Chunk(source.path, number, [value])
                documents, report = encoder_of(template, settings.encoding).encode(chunk)
                if report.left_out:
                    raise UserError(*message_and_hint(next(iter(report.problems.values()))[1]))
                return [documents.sample(place) for place in range(len(documents))]
        first += number + 1
    raise UserError(f"row {row}: there are {first:,} rows, numbered from 0", "give a smaller number")


# ---- tokens ----


def _encode(sources: list[Source], encoder: Encodes, settings: DataSettings, writer: Writer) -> dict[str, Any]:
    """Encode all rows into `writer`; return what is kept beside them. Raises UserError for rows that cannot be used."""
    report, count = Report(), 0
    digest = hashlib.sha256(f"{settings.seq_length} {settings.packing}".encode())
    first_rows = []
    with _progress() as progress:
        for source in sources:
            first_rows.append(report.rows)
            for documents, part in _encoded(source.path, encoder, settings):
                documents = replace(documents, rows=documents.rows + first_rows[-1])
                for data in documents.written():
                    digest.update(data)
                writer.add(documents)
                count += len(documents)
                report.add(part)
                progress(report.rows)
    if settings.check_names:
        report.check_names(settings.names)
    report.check_rows(settings.on_bad_row)
    if not count:
        message, hint = message_and_hint(next(iter(report.problems.values()))[1])
        raise UserError(f"none of the {report.rows} rows can be used; the first: {message}", hint)
    return {"report": report.to_json(), "first_rows": first_rows, "fingerprint": digest.hexdigest()}


def _encoded(path: str, encoder: Encodes, settings: DataSettings) -> Iterator[tuple[Documents, Report]]:
    """Yield the documents and reports of the chunks of one source, in order."""
    done = 0  # chunks that went through before a file turned out not to be JSON Lines
    for lines in (True, False):
        try:
            for result in islice(_encode_chunks(path, encoder, settings, lines), done, None):
                yield result
                done += 1
            return
        except NotLines:
            if not lines:
                raise


def _encode_chunks(
    path: str, encoder: Encodes, settings: DataSettings, lines: bool
) -> Iterator[tuple[Documents, Report]]:
    chunks = _limited(read_chunks(path, lines=lines), settings.max_rows)
    first = list(islice(chunks, _INLINE))
    processes = settings.processes or len(os.sched_getaffinity(0))
    rest = list(islice(chunks, 1)) if len(first) == _INLINE else []
    if settings.processes is None and (not rest or processes == 1):
        for chunk in _chained(first, rest, chunks):
            yield encoder.encode(chunk)
        return
    yield from encode_all(encoder, _chained(first, rest, chunks), processes)


def _chained(*parts: Iterable[Chunk]) -> Iterator[Chunk]:
    for part in parts:
        yield from part


def _limited(chunks: Iterator[Chunk], max_rows: int | None) -> Iterator[Chunk]:
    """Yield the first max_rows rows."""
    for chunk in chunks:
        if max_rows is None or chunk.first + len(chunk) <= max_rows:
            yield chunk
            continue
        left = max_rows - chunk.first
        if left > 0:
            rows, raw = chunk.rows, chunk.lines
            yield replace(chunk, rows=rows and rows[:left], lines=raw and raw[:left])
        return


def _key(
    sources: list[Source], template: Rendering, settings: DataSettings, content: Callable[[Path], str] = file_digest
) -> str:
    """Return a hash of all that the tokens of the rows depend on: content, tokenizer, template, settings, and this
    code. content: gives the digest of a file.
    """
    backend = getattr(template.tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else repr(sorted(template.tokenizer.get_vocab().items()))
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    depends = {
        "content": [dataset_fingerprint(source.path) or content(Path(source.path)) for source in sources],
        "names": [Path(source.path).name for source in sources],
        # Images are found from there, and the documents say where.
        "images": [os.path.abspath(source.path) for source in sources] if isinstance(template, ImageRows) else [],
        "tokenizer": hashlib.sha256(model.encode()).hexdigest(),
        "special": sorted(map(str, template.tokenizer.all_special_tokens)),
        "template": template.identity(),
        "settings": asdict(settings.encoding) | {"names": _names(settings.names)},
        "rows": [settings.max_rows, settings.packing, settings.on_bad_row, settings.check_names],
        "versions": [tokenizers.__version__, transformers.__version__, code.hexdigest()],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


def _names(names: FieldNames) -> list[Any]:
    return [sorted(names.columns.items()), sorted(names.ignored)]


@contextmanager
def _progress() -> Iterator[Any]:
    """Yield a function that is told how many rows are done: a line on the terminal, or one each half minute."""
    terminal, started = sys.stderr.isatty(), time.monotonic()
    told = started

    def tell(rows: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < (0.5 if terminal else 30):
            return
        told = now
        text = f"tokenised {rows:,} rows, {rows / (now - started):,.0f} a second"
        print(f"\r{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)

    yield tell
    if terminal and told != started:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- which documents, in which order ----


def _chosen(
    documents: Documents, sources: list[Source], first_rows: list[int], seed: int, eval_fraction: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return documents to train on, as often as their source's weight says, and those held out."""
    everything = np.arange(len(documents))
    held = None
    if eval_fraction:
        rows = np.unique(documents.rows)
        count = round(len(rows) * eval_fraction)
        if not 0 < count < len(rows):
            raise UserError(
                f"--eval_fraction {eval_fraction}: {count} of {len(rows)} rows would be held out; "
                "both sides need a row",
                "choose another share",
            )
        drawn = rows[permutation(len(rows), seed, EVALUATION_EPOCH)[:count]]
        mask = np.isin(documents.rows, drawn)
        everything, held = everything[~mask], everything[mask]
    parts = []
    bounds = [*first_rows, np.iinfo(np.int64).max]
    for number, source in enumerate(sources):
        rows = documents.rows[everything]
        mine = everything[(rows >= bounds[number]) & (rows < bounds[number + 1])]
        whole, part = divmod(source.weight, 1)
        parts += [mine] * whole
        if part:
            count = round(Fraction(len(mine)) * part)
            if not whole and not count and len(mine):
                share = f"{source.path}:{float(source.weight):g}"
                raise UserError(
                    f"--data_path {share} leaves none of its {len(mine):,} documents",
                    "raise the weight, or leave the path out",
                )
            taken = permutation(len(mine), seed, SOURCE_EPOCH - number)[:count]
            parts.append(mine[np.sort(taken)])
    return np.concatenate(parts), held


def _layout(
    folder: Path,
    name: str,
    documents: Documents,
    chosen: np.ndarray,
    settings: DataSettings,
    seed: int,
    identity: list[Any],
    sides: Sides | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (members, row_ends) of the packed rows, found beside the tokens or made."""
    digest = hashlib.sha256(json.dumps([name, seed, identity]).encode()).hexdigest()[:16]
    path = folder / f"layout-{digest}.npz"
    with locked(folder.with_name(f"{folder.name}.lock")):  # one rank makes it, the others find it
        found = load_arrays(path, ("members", "row_ends"))
        if found is None:
            found = _packed(documents, chosen, settings, seed, sides)
            save_arrays(path, members=found[0], row_ends=found[1])
    return found[0], found[1]


def _packed(
    documents: Documents, chosen: np.ndarray, settings: DataSettings, seed: int, sides: Sides | None
) -> list[np.ndarray]:
    """Return [members, row_ends] of the packed rows."""
    order = chosen[permutation(len(chosen), seed, PACKING_EPOCH)]
    if sides is None:
        places, row_ends = pack_arrays(documents.lengths[order], settings.seq_length, settings.packing)
        return [order[places], row_ends]
    limits = (sides.source_length, settings.seq_length)
    bins = pack_sides(Sides.lengths(documents)[order], limits, settings.packing)
    members = order[np.fromiter((index for row in bins for index in row), np.int64, len(order))]
    return [members, np.cumsum([len(row) for row in bins], dtype=np.int64)]
