"""Readers: a file, a folder or a dataset -> rows, one after another, by suffix.

`READERS` is the table of suffixes. To add a format, write a function that yields its rows and add its line. A file of
any of them may be compressed (.gz, .zst). What a reader needs beside the standard library is imported when it is used,
and named where it is missing.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..files import check_regular, unique_fields
from .json_stream import ROW_BYTES, is_lines, read_lines, read_values, too_long

CHUNK = 1024  # rows handed on at a time
_BATCH = 1024  # rows of a table decoded at a time


@dataclass(frozen=True)
class Source:
    """A part of the training data: a file, or a dataset of the Hugging Face hub.

    path    as the user gave it, or a file of the folder that was given
    weight  how often its rows are used: 2 is twice, 1/2 is every second row on average
    """

    path: str
    weight: Fraction = Fraction(1)


@dataclass(frozen=True)
class Chunk:
    """Rows of a source: parsed, or lines of JSON with their numbers, to be parsed where they are used."""

    path: str
    first: int
    rows: list[Any] | None = None
    lines: list[tuple[int, bytes]] | None = None

    def __len__(self) -> int:
        return len(self.rows if self.lines is None else self.lines)

    def parse(self) -> list[Any]:
        """Return the rows. Raises NotLines where a line is not one JSON value."""
        if self.lines is None:
            return self.rows
        try:
            return [json.loads(line, object_pairs_hook=unique_fields) for _, line in self.lines]
        except (ValueError, RecursionError):
            raise NotLines from None


class NotLines(Exception):
    """A file that began as JSON Lines goes on in another layout or is damaged: `lines=False` reads it or says where."""


def parse_sources(data_path: str) -> list[Source]:
    """Return the sources of --data_path: paths separated by commas, each with `:weight` behind it or not.

    A path is a file, a folder (all files in it, in the order of their names) or a dataset of the Hugging Face hub.
    Raises UserError for a path that is not there, a weight that is not above 0, or a folder with files that cannot be
    read as rows.
    """
    sources = []
    for part in [data_path] if Path(data_path).exists() else data_path.split(","):
        path, weight = part.strip(), Fraction(1)
        if not path:
            raise UserError(f"--data_path {data_path}: an empty path between commas", "remove the comma")
        head, colon, tail = path.rpartition(":")
        if colon and not Path(path).exists() and re.fullmatch(r"[0-9]*\.?[0-9]+", tail):
            path, weight = head, Fraction(tail)
        if weight <= 0:
            raise UserError(f"--data_path {part}: the weight must be above 0", "leave the path out instead")
        sources += [Source(file, weight) for file in _files(path)]
    return sources


def read_rows(path: str | Path) -> Iterator[Any]:
    """Yield the raw rows of one file or dataset, as JSON gives them (an object each, where the file is sound).

    Raises UserError (file, line, column) where the file is missing, has no rows, or cannot be read in its format.
    """
    for chunk in read_chunks(str(path), lines=False):
        yield from chunk.rows


def read_chunks(path: str, *, lines: bool = True) -> Iterator[Chunk]:
    """Yield the rows of one source in chunks. Where `lines` is set, JSON Lines are left unparsed."""
    first = 0
    for rows, raw in _batches(path, lines):
        yield Chunk(path, first, lines=rows) if raw else Chunk(path, first, rows)
        first += len(rows)
    if not first:
        raise UserError(f"{path} holds no rows", "write at least one, such as {instruction, input, output}")


def _batches(path: str, lines: bool) -> Iterator[tuple[list, bool]]:
    if not Path(path).exists() and is_hub_name(path) or _is_saved_dataset(Path(path)):
        yield from ((rows, False) for rows in _chunked(_dataset_rows(path)))
        return
    suffix, compression = _suffixes(Path(path))
    reader = READERS.get(suffix, _json)
    if suffix not in READERS and suffix in UNREADABLE:
        raise UserError(f"{path}: {UNREADABLE[suffix][0]}", UNREADABLE[suffix][1])
    try:
        if reader is _json:
            _check_is_text(path, compression)
        if lines and reader is _json:
            with _opened(path, compression) as file:
                lines = is_lines(file)
            if lines:
                with _opened(path, compression) as file:
                    yield from ((rows, True) for rows in _chunked(read_lines(file, path)))
                return
        with _opened(path, compression) as file:
            yield from ((rows, False) for rows in _chunked(reader(file, path)))
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile) or error.errno is None:
            raise UserError(f"{path} is damaged: {error}", "copy the file again") from None
        reason = error.strerror or error
        raise UserError(f"cannot read the data file {path}: {reason}", "check the path") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}", "copy the file again") from None


def _check_is_text(path: str, compression: str) -> None:
    """Raise UserError where a file that is named as JSON begins as one of another format does."""
    with _opened(path, compression) as file:
        head = file.read(6)
    found = next((suffix for start, suffix in _STARTS.items() if head.startswith(start)), None)
    if found is not None:
        raise UserError(f"{path} is a {found[1:]} file by its first bytes", f"end its name in {found}")


def _chunked(rows: Iterator[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# ---- formats of files ----


def _json(file: BinaryIO, name: str) -> Iterator[Any]:
    return read_values(file, name)


class _Lines:
    """The lines of a text, of which a row may have several: more than ROW_BYTES characters of one are an error."""

    def __init__(self, file: BinaryIO, name: str, newline: str):
        self._text, self._name = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline), name
        self.number = self._held = 0

    def begin(self) -> None:
        """Begin another row."""
        self._held = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(ROW_BYTES + 1):
            self.number += 1
            self._held += len(line)
            if self._held > ROW_BYTES:
                raise too_long(f"{self._name} line {self.number}")
            yield line


def _table(separator: str) -> Callable[[BinaryIO, str], Iterator[Any]]:
    def rows(file: BinaryIO, name: str) -> Iterator[Any]:
        csv.field_size_limit(ROW_BYTES)
        lines = _Lines(file, name, "")
        reader = csv.reader(lines, delimiter=separator, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(f"{name} line 1: a column is named twice", "give each its own name")
            for values in reader:
                lines.begin()
                if not values:
                    continue
                if len(values) != len(header):
                    raise UserError(
                        f"{name} line {reader.line_num}: {len(values)} fields, but the header has {len(header)}",
                        "put texts that hold the separator in double quotes",
                    )
                yield dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise UserError(f"{name} line {reader.line_num}: not a table ({error})", "fix the file there") from None
        except UnicodeDecodeError:
            raise UserError(f"{name} after line {reader.line_num}: not UTF-8", "save the file as UTF-8") from None

    return rows


def _conll(file: BinaryIO, name: str) -> Iterator[Any]:
    """Yield a word and its tag a line, the first and the last of its columns; blank lines between sentences."""
    words: list[str] = []
    tags: list[str] = []
    lines = _Lines(file, name, "\n")
    try:
        for line in lines:
            columns = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            if columns and columns[0] == "-DOCSTART-":
                continue
            if not line.strip():
                if words:
                    yield {"tokens": words, "tags": tags}
                words, tags = [], []
                lines.begin()
                continue
            if len(columns) < 2:
                raise UserError(f"{name} line {lines.number}: a word without a tag", "put a blank or tab between them")
            words.append(columns[0])
            tags.append(columns[-1])
    except UnicodeDecodeError:
        raise UserError(f"{name} after line {lines.number}: not UTF-8", "save the file as UTF-8") from None
    if words:
        yield {"tokens": words, "tags": tags}


def _parquet(file: BinaryIO, name: str) -> Iterator[Any]:
    pyarrow = _import("pyarrow", f"{name} is a parquet file")
    parquet = _import("pyarrow.parquet", f"{name} is a parquet file")
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=_BATCH):
            yield from _rows_of_batch(batch)
    except _damages(pyarrow) as error:
        raise UserError(f"{name} cannot be read as parquet: {error}", "copy the file again") from None


def _arrow(file: BinaryIO, name: str) -> Iterator[Any]:
    pyarrow = _import("pyarrow", f"{name} is an arrow file")
    try:
        try:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        for batch in batches:
            yield from _rows_of_batch(batch)
    except _damages(pyarrow) as error:
        raise UserError(f"{name} cannot be read as arrow: {error}", "copy the file again") from None


def _damages(pyarrow: Any) -> tuple[type[Exception], ...]:
    """Return what reading a damaged table may raise: a size in it may be any number."""
    return pyarrow.ArrowException, ValueError, MemoryError, OverflowError


def _rows_of_batch(batch: Any) -> Iterator[dict[str, Any]]:
    batch.validate(full=True)  # offsets that lead out of the file are followed otherwise, and the process dies
    return map(_row_of_table, batch.to_pylist())


def _row_of_table(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without nulls in its objects: in a table the arguments of a call have the fields of all calls."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[BinaryIO, str], Iterator[Any]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2"), _conll),
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}

UNREADABLE = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), ("a spreadsheet cannot be read", "save it as CSV")),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), ("an archive cannot be read", "unpack it first")),
    **dict.fromkeys((".bz2", ".xz", ".lz4"), ("this compression cannot be read", "use .gz or .zst")),
    **dict.fromkeys((".pt", ".pkl", ".bin", ".npy", ".safetensors"), ("this format holds no rows", "write JSON Lines")),
    **dict.fromkeys((".yaml", ".yml", ".xml", ".txt", ".md"), ("this format is not read", "write JSON Lines")),
}
_COMPRESSED = (".gz", ".zst")


_STARTS = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}


def _suffixes(path: Path) -> tuple[str, str]:
    """Return (suffix of the format, suffix of the compression or "")."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def _opened(path: str, compression: str) -> BinaryIO:
    check_regular(Path(path))
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        zstandard = _import("zstandard", f"{path} is compressed with zstd")
        return io.BufferedReader(_ZstdErrors(zstandard, path), 1 << 20)
    return open(path, "rb")


class _ZstdErrors(io.RawIOBase):
    """A zstd file as a stream, whose damage is an OSError like that of gzip."""

    def __init__(self, zstandard: Any, path: str):
        self._file = open(path, "rb")
        self._error = zstandard.ZstdError
        self._stream = zstandard.ZstdDecompressor().stream_reader(self._file, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except self._error as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        self._file.close()
        super().close()


# ---- folders and datasets ----

_HARMLESS_FILES = re.compile(r"(\..*|readme.*|license.*|.*\.md|.*\.lock|dataset_infos?\.json|.*\.py)", re.IGNORECASE)


def is_hub_name(path: str) -> bool:
    """Return whether a path that is not there may be the name of a dataset of the Hugging Face hub: owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None and not _suffixes(Path(path))[0]


def dataset_fingerprint(path: str) -> str | None:
    """Return what identifies the content of a dataset of the hub or one saved by `datasets`; None for a file."""
    if Path(path).is_file():
        return None
    return str(_load_dataset(path)._fingerprint)


def _files(path: str) -> list[str]:
    folder = Path(path)
    if not folder.is_dir() or _is_saved_dataset(folder):
        if not folder.exists() and not is_hub_name(path):
            raise UserError(f"cannot read the data file {path}: No such file or directory", "check the path")
        return [path]
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    rows = [file for file in found if _suffixes(file)[0] in READERS and not _HARMLESS_FILES.fullmatch(file.name)]
    others = [file for file in found if file not in rows and not _HARMLESS_FILES.fullmatch(file.name)]
    if others:
        raise UserError(
            f"--data_path {path}: the folder holds {others[0].relative_to(folder)}, which is not read "
            f"({', '.join(READERS)} are)",
            "take it out, or name the files one by one",
        )
    if not rows:
        raise UserError(
            f"--data_path {path}: the folder holds no file of rows", f"put one there ({', '.join(READERS)})"
        )
    return [str(file) for file in rows]


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _dataset_rows(path: str) -> Iterator[Any]:
    dataset = _load_dataset(path)
    for start in range(0, len(dataset), _BATCH):
        columns = dataset[start : start + _BATCH]
        names = list(columns)
        for values in zip(*columns.values(), strict=True):
            yield _row_of_table(dict(zip(names, values, strict=True)))


def _load_dataset(path: str) -> Any:
    """Return the one split of a dataset that is trained on."""
    what = "a dataset that was saved by `datasets`" if Path(path).exists() else "no file here, but may be on the hub"
    datasets = _import("datasets", f"{path} is {what}")
    if int(datasets.__version__.partition(".")[0]) < 4:  # older ones run code that comes with a dataset
        raise UserError(
            f"{path} is {what}: reading it needs datasets 4 or newer, here is {datasets.__version__}",
            "pip install --upgrade datasets",
        )
    try:
        if Path(path).exists():
            dataset = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(path)
    except Exception as error:  # the library raises whatever its parsers and the network raise
        raise UserError(f"cannot read the dataset {path}: {error}", "check the path") from None
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise UserError(f"{path} has the splits {', '.join(dataset)}, none named train", "give one split's folder")
        dataset = dataset["train"]
    return dataset


def _import(module: str, why: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{why}: reading it needs the package {package}", f"pip install {package}") from None
