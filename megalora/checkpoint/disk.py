"""Tensors in files of torch.save: pickles that can only hold tensors and plain values."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from megalora.errors import UserError
from megalora.files import check_regular


def save_tensors(value: Any, stream: BinaryIO) -> None:
    """Save as torch.save does, for a thread beside others: it holds the interpreter for no copy of tensors. Raises
    OSError.
    """
    guarded = _Guarded(stream)
    torch.save(value, cast(BinaryIO, guarded))  # it only writes
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
    """Return the value in a file of torch.save, on the CPU; only tensors and plain values. Raises UserError.

    mmap  tensors are views of the mapped file, read as they are touched
    """
    check_regular(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{file}: does not exist", "copy all of the checkpoint") from None
    except Exception as error:  # torch.load fails on damaged or hostile bytes in any way
        raise UserError(
            f"{file}: cannot be read as tensors and plain values ({type(error).__name__}: {error!s:.120}): "
            "the file is damaged, or not one of ours",
            "take another checkpoint",
        ) from None
