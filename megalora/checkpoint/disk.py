"""Files that are on disk when the call returns, and pickles that can only hold tensors and plain values."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megalora.errors import UserError


def write_file(file: Path, data: bytes | Callable[[BinaryIO], Any]) -> None:
    """Writes and fsyncs a file, whole or not at all: aside first, then renamed. Raises OSError.

    data  the contents, or what writes them to a stream
    """
    aside = aside_of(file)
    try:
        with aside.open("wb") as stream:
            stream.write(data) if isinstance(data, bytes) else data(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def aside_of(file: Path) -> Path:
    """Where `write_file` writes before it renames; it is left there only by a process that was killed."""
    return file.with_name(f".{file.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # some network file systems have it for files only
            raise
    finally:
        os.close(descriptor)


def save_tensors(value: Any, stream: BinaryIO) -> None:
    """torch.save, for a thread beside others: it holds the interpreter for no copy of tensors. Raises OSError."""
    guarded = _Guarded(stream)
    torch.save(value, guarded)
    if guarded.error is not None:
        raise guarded.error


class _Guarded(io.RawIOBase):
    """Hands on what torch writes; keeps the first error, which torch would report without its reason."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self.error = error
        return size


def unpickled(file: Path, mmap: bool = False) -> Any:
    """The value in a file of torch.save, on the CPU; only tensors and plain values. Raises UserError.

    mmap  tensors are views of the mapped file, read as they are touched
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{file}: does not exist: copy all of the checkpoint") from None
    except Exception as error:  # torch.load fails on damaged or hostile bytes in any way
        raise UserError(
            f"{file}: cannot be read as tensors and plain values ({type(error).__name__}: {error!s:.120}): "
            "the file is damaged, or not one of ours; take another checkpoint"
        ) from None


def sha256(file: Path) -> str:
    """Hash of the contents, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
