"""Cache: the documents of a data set on disk, memory-mapped, verified, and made once for all ranks and runs.

    {data_cache}/{key}/manifest.json   sizes and SHA-256 of the files, the report of the rows
                       ids.bin         token ids, int32           (see documents.py)
                       runs.bin        labelled runs, int32
                       column-*.bin    what else is read of each token, int32, by name
                       pictures.jsonl      path, SHA-256 and tokens of each document's image, where they have one
                       index.npz       ends, run_ends, rows, and the weights of the runs where they are not all 1
                       layout-*.npz    which document lies in which row, by seed
    {data_cache}/{key}.lock            held while it is made or verified
    {data_cache}/{key}.checked         touched when that was done: who waited meanwhile need not do it again
    {data_cache}/{key}.failed          the error that ended it, for who waited meanwhile
    {data_cache}/file-*.json           digests of data files, see `known_digest`

The key is a hash of everything that the documents depend on. A cache that is missing, incomplete or damaged is made
again. It is written aside and renamed, so that a reader never sees half of it; who comes second waits for the lock and
finds it made.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from ..pictures import Picture
from .documents import Documents
from .report import BadRows

PICTURES = "pictures.jsonl"
_BLOCK = 1 << 28  # bytes of a file that one thread hashes,
_READ = 1 << 20  # so many at a time
_HASHERS = 4  # threads
_SETTLED = 3.0  # seconds after which a file that is written to has another time: the coarsest clock of a file system


def default_cache() -> Path:
    """Return the folder of the tokens where none is named: megalora/data in the user's cache (XDG_CACHE_HOME)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalora" / "data"


class Writer:
    """Writes documents to a folder as they come."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._ids, self._runs = (folder / "ids.bin").open("wb"), (folder / "runs.bin").open("wb")
        self._columns: dict[str, tuple[BinaryIO, tuple[int, ...]]] = {}  # name -> file, shape behind the tokens
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._pictures: BinaryIO | None = None

    def add(self, documents: Documents) -> None:
        self._ids.write(np.ascontiguousarray(documents.ids, dtype="<i4").data)
        self._runs.write(np.ascontiguousarray(documents.runs, dtype="<i4").data)
        for name, column in documents.columns.items():
            if name not in self._columns:
                self._columns[name] = (self.folder / f"column-{name}.bin").open("wb"), column.shape[1:]
            self._columns[name][0].write(np.ascontiguousarray(column, dtype="<i4").data)
        if documents.pictures:
            self._pictures = self._pictures or (self.folder / PICTURES).open("wb")
            for one in documents.pictures:
                self._pictures.write(json.dumps([one.path, one.digest, one.tokens]).encode() + b"\n")
        weights = np.ones(len(documents.runs), np.float32) if documents.weights is None else documents.weights
        self._parts.append((documents.lengths, np.diff(documents.run_ends, prepend=0), documents.rows, weights))

    def finish(self, report: dict[str, Any]) -> None:
        """Write the index and the manifest, all of it to the disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        columns = list(zip(*self._parts, strict=True)) or [[np.empty(0, np.int64)]] * 4
        lengths, counts, rows, weights = map(np.concatenate, columns)
        index = {"ends": np.cumsum(lengths), "run_ends": np.cumsum(counts), "rows": rows}
        save_arrays(self.folder / "index.npz", **index, **({} if (weights == 1).all() else {"weights": weights}))
        files = {
            name: [(self.folder / name).stat().st_size, file_digest(self.folder / name)]
            for name in (*(Path(file.name).name for file in self._files), "index.npz")
        }
        columns_of = {name: list(shape) for name, (_, shape) in self._columns.items()}
        text = json.dumps({"files": files, "report": report, "columns": columns_of})
        write_text(self.folder / "manifest.json", f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")

    def abandon(self) -> None:
        for file in self._files:
            file.close()

    @property
    def _files(self) -> list[BinaryIO]:
        own = [self._ids, self._runs, *(file for file, _ in self._columns.values())]
        return own if self._pictures is None else [*own, self._pictures]


def cached(root: Path, key: str, make: Callable[[Writer], dict[str, Any]]) -> tuple[Path, dict[str, Any], bool]:
    """Return the folder of the documents of `key`, their report, and whether they were made now.

    make(writer) adds all documents and returns the report. Only one process at a time makes the documents of a key; the
    others wait. Raises UserError where the folder cannot be written, and what `make` raises; who waited for a process
    that failed raises the same UserError and does not try again.
    """
    folder, failed, checked = root / key, root / f"{key}.failed", root / f"{key}.checked"
    asked = time.time()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{key}.lock") as alone:
            report = verified(folder, contents=not _since(checked, asked))
            if report is not None:
                checked.touch()
                return folder, report, False
            if _since(failed, asked):
                raise BadRows(*json.loads(failed.read_text(encoding="utf-8")))
            failed.unlink(missing_ok=True)
            if alone:  # these are of processes that were killed
                for rest in root.glob(f"{key}.partial*"):
                    shutil.rmtree(rest, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=root))
            writer = Writer(partial)
            try:
                report = make(writer)
                writer.finish(report)
            except BaseException as error:
                writer.abandon()
                shutil.rmtree(partial, ignore_errors=True)
                if isinstance(error, UserError):
                    write_text(failed, json.dumps([error.message, error.hint]))
                raise
            _put(partial, folder)
            checked.touch()
            return folder, report, True
    except OSError as error:
        raise UserError(
            f"cannot write the tokens of the rows to {root}: {error.strerror or error}",
            "make room or name another folder with --data_cache",
        ) from None


def verified(folder: Path, *, contents: bool = True) -> dict[str, Any] | None:
    """Return the report of a cache whose files are all as they were written, else None.

    contents  False: their sizes are enough, since another process has just looked at the rest
    """
    try:
        digest, _, text = (folder / "manifest.json").read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            return None
        manifest = json.loads(text)
        for name, (size, _) in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                return None
        if contents and any(file_digest(folder / name) != sha for name, (_, sha) in manifest["files"].items()):
            return None
        return manifest["report"]
    except (OSError, ValueError, UnicodeDecodeError):
        return None


def open_documents(folder: Path) -> Documents:
    """Map the documents of a folder that was written or verified before."""
    with np.load(folder / "index.npz") as index:
        ends, run_ends, rows = index["ends"], index["run_ends"], index["rows"]
        weights = index["weights"] if "weights" in index else None
    _, _, text = (folder / "manifest.json").read_text(encoding="utf-8").partition("\n")
    columns = {
        name: _mapped(folder / f"column-{name}.bin").reshape(-1, *shape)
        for name, shape in json.loads(text)["columns"].items()
    }
    ids, runs = _mapped(folder / "ids.bin"), _mapped(folder / "runs.bin").reshape(-1, 2)
    pictures: list[Picture] = []
    if (folder / PICTURES).exists():
        with (folder / PICTURES).open("rb") as file:
            pictures = [Picture(*json.loads(line)) for line in file]
    return Documents(ids, ends, runs, run_ends, rows, columns, weights, pictures)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the SHA-256 of a file's blocks, which several threads hash."""
    size = path.stat().st_size

    def block(start: int) -> bytes:
        digest, left, buffer = hashlib.sha256(), _BLOCK, memoryview(bytearray(_READ))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left and (count := file.readinto(buffer[:left])):
                digest.update(buffer[:count])
                left -= count
        return digest.digest()

    with ThreadPoolExecutor(_HASHERS) as threads:
        parts = list(threads.map(block, range(0, size, _BLOCK)))
    return hashlib.sha256(b"".join(parts) + size.to_bytes(8, "little")).hexdigest()


def known_digest(root: Path, path: Path) -> str:
    """Return `file_digest` of a data file, which is hashed again only where it may have been touched since.

    As git's index does it: what identifies a file, its size and its times, of which every write moves one that no
    program can set back, are kept beside its digest. A file that was written to a moment ago is not kept, since one
    more write may have the same time.
    """
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    kept, stamp = root / f"file-{name}.json", _stamp(path)
    try:
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["stamp"] == stamp:
            return str(before["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    now, digest = time.time(), file_digest(path)
    if _stamp(path) == stamp and now - max(stamp[-2:]) / 1e9 > _SETTLED:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with _whole(kept) as file:
                file.write(json.dumps({"path": str(path), "stamp": stamp, "digest": digest}).encode())
        except OSError:
            pass  # the folder cannot be written: `cached` says so where that is needed
    return digest


def _stamp(path: Path) -> list[int]:
    """Return what is another number once a file is written to or replaced; the last two are times in ns."""
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays to a file, whole or not at all."""
    with _whole(path) as file:
        np.savez(file, **arrays)


def load_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray] | None:
    """Return the arrays of a file, None where it is missing or damaged (the format has checksums of its own)."""
    try:
        with np.load(path) as file:
            return [file[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` once it is written; several processes may do so."""
    number, aside = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _mapped(path: Path) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, np.int32)
    return np.memmap(path, dtype="<i4", mode="r")


def _since(marker: Path, moment: float) -> bool:
    """Return whether a marker was touched since, by the process that this one has waited for."""
    return marker.exists() and marker.stat().st_mtime >= moment


def _put(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`, in place of a damaged one; without locks another process may have been first."""
    if folder.exists():
        if verified(folder) is not None:
            shutil.rmtree(partial, ignore_errors=True)
            return
        damaged = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        folder.rename(damaged / folder.name)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:
        if verified(folder) is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file and yield whether it is held: without locks each process makes the documents itself."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            held = False
        yield held
