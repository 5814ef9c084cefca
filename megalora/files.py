"""Files on disk, without torch: read within bounds, written whole or not at all, locked, and never through a link.

What comes from strangers is read by `read_bytes` and `read_json`: regular files only, and only up to a size. What is
ours is written by `write_file` and `atomic_folder` (aside, fsync, rename) or opened by `open_own`, behind no link.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megalora.errors import UserError

try:
    import fcntl
except ImportError:  # a platform without it
    fcntl = None

JSON_BYTES = 16 << 20  # of a JSON file that lists no tensors: the largest of real models are below 1 MB
TEXT_BYTES = 64 << 20  # of a text that people write
YAML_BYTES = 128 << 10  # of flags; a megabyte takes PyYAML ten seconds
_YAML_DEPTH = 500
_YAML_VALUES = 10_000  # with those that an alias stands for, each time
_NO_LOCKS = "this system has no flock"


# ---- reading ----


def check_regular(file: Path) -> None:
    """Raise UserError if `file` is there and is no regular file: a pipe or a device would be read without end."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{file}: is not a regular file", "put the file itself there")


def read_bytes(file: Path, most: int) -> bytes:
    """Return the contents of a regular file. Raises OSError, and UserError for more than `most` bytes or no file."""
    check_regular(file)
    with file.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise UserError(f"{file}: is larger than {most:,} bytes, which no such file is", "replace it by the right one")
    return data


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; for `object_pairs_hook`. Raises RepeatedField: of two values one would be lost."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedField(next(name for name in names if names.count(name) > 1))
    return fields


class RepeatedField(ValueError):
    """An object of JSON that has a field twice."""

    def __init__(self, name: str):
        self.name = name
        super().__init__(f"an object has the field {name[:40]!r} twice")


def read_json(
    file: Path, remedy: str = "copy or download it again", *, what: str = "", most: int = JSON_BYTES
) -> dict[str, Any]:
    """Return the object in a JSON file.

    what    the flag that names it, for the message
    remedy  what the user can do about a file that is damaged, for the message
    most    bytes that it may have
    Raises UserError that names the file: missing, too large, not regular, not JSON, nested too deeply, not an object,
    a field that an object has twice.
    """
    name = f"{what} {file}".lstrip()
    try:
        value = json.loads(read_bytes(file, most), object_pairs_hook=unique_fields)
    except RepeatedField as error:
        raise UserError(f"{name}: {error}", "keep one of the two") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})", remedy) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{name}: is not JSON ({why})", remedy) from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: holds a {type(value).__name__}, not an object", remedy)
    return value


def read_text(file: Path, remedy: str = "save it as UTF-8", *, what: str = "", most: int = TEXT_BYTES) -> str:
    """Return the text of a regular file in UTF-8, without a byte order mark. Arguments as of `read_json`.

    Raises UserError that names the file, and for other bytes their line.
    """
    name = f"{what} {file}".lstrip()
    data = b""
    try:
        data = read_bytes(file, most)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})", "check the path") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} line {line}: byte {error.start} is not UTF-8", remedy) from None


def yaml_pairs(text: str) -> list[tuple[Any, Any]] | None:
    """Return the (key, value) pairs of a YAML text, doubles included; None where it holds something else.

    Plain values only. Raises yaml.YAMLError and ValueError, also for a text that is too deep or multiplies itself.
    """
    import yaml

    depths = itertools.accumulate((mark in "[{") - (mark in "]}") for mark in text)
    if len(text) > YAML_BYTES or max(depths, default=0) > _YAML_DEPTH:  # of which PyYAML takes the square
        raise ValueError(f"more than {YAML_BYTES:,} characters, or nested too deeply")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if _values_of(node, {}) > _YAML_VALUES:
            raise ValueError(f"more than {_YAML_VALUES:,} values")
        if node is not None and not isinstance(node, yaml.MappingNode):
            return None
        pairs = [] if node is None else node.value
        return [(loader.construct_object(key, deep=True), loader.construct_object(v, deep=True)) for key, v in pairs]
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (TypeError, AttributeError, OverflowError) as error:  # PyYAML's own, of odd values
        raise ValueError(str(error)) from None
    finally:
        loader.dispose()


def _values_of(node: Any, known: dict[int, float]) -> float:
    """Return how many values are below a YAML node; an alias counts each time, one within itself without end."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        inner = getattr(node, "value", None)
        parts = inner if isinstance(inner, list) else []
        flat = (part for item in parts for part in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_values_of(part, known) for part in flat)
    return known[id(node)]


def sha256(file: Path) -> str:
    """Return the hash of the contents, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- writing ----


def refuse_link(path: Path) -> None:
    """Raise UserError if `path` is a symbolic link: what is written or removed behind it may be another program's."""
    if path.is_symlink():
        raise UserError(
            f"{path}: is a symbolic link, behind which megalora writes and removes nothing",
            "remove the link, or name another folder",
        )


def open_own(path: Path) -> TextIO:
    """Open a file of ours to read it and append to it, made if it is missing. It follows no link and is line-buffered.

    Raises OSError, and UserError where something else than a regular file has the name.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_link(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: is not a regular file", "remove it, or name another folder")
    return open(descriptor, "a+", encoding="utf-8", errors="replace", buffering=1)


def write_file(file: Path, data: bytes | Callable[[BinaryIO], Any]) -> None:
    """Write and fsync a file, whole or not at all: aside first, then renamed. Raises OSError.

    data  the contents, or what writes them to a stream
    A link of that name is replaced, not followed.
    """
    aside = aside_of(file)
    aside.unlink(missing_ok=True)  # of a process that was killed; or a link
    try:
        with aside.open("xb") as stream:
            stream.write(data) if isinstance(data, bytes) else data(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def aside_of(path: Path) -> Path:
    """Return where `write_file` and `atomic_folder` write before they rename; a process that is killed leaves it."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have it for files only
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` to write in: it takes that name at the end, or is removed.

    Raises OSError, and BlockingIOError while another process writes there.
    """
    aside = aside_of(path)
    refuse_link(aside)
    made = [folder for folder in path.parents if not folder.exists()]
    aside.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        lock(descriptor)  # a file system without locks serves one process
        try:
            for stale in aside.iterdir():  # of a process that was killed
                shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()
            yield aside
            for folder in [aside, *(child for child in aside.rglob("*") if child.is_dir())]:
                sync_folder(folder)
            put_in_place(aside, path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()
            raise
    finally:
        os.close(descriptor)


def put_in_place(aside: Path, path: Path) -> None:
    """Give a folder that is on disk its name; what had that name is removed. Raises OSError."""
    replaced = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    aside.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


# ---- locking ----


def lock(descriptor: int) -> str | None:
    """Take the lock of an open file or folder, without waiting; return why not where the file system has no locks.

    It is let go of when the descriptor is closed, however the process ends. Raises BlockingIOError where it is held.
    """
    if fcntl is None:
        return _NO_LOCKS
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # ENOLCK, EOPNOTSUPP, ENOSYS, ...
        return error.strerror or str(error)
    return None
