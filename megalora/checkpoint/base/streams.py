"""Files of tensors written as a stream, a block at a time: safetensors, and what torch.save writes.

Both are told first what they will hold, and then take the bytes in that order, so that a file of any size is
written with a block in memory. torch.save would want all of its tensors at once.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megalora.checkpoint.base.hf import STORED

ALIGNMENT = 64  # of the tensors in a file of torch.save, as torch has it: they can be used where they are mapped
_HEADER_BYTES, _ZIP64_BYTES, _PADDING_ID = 30, 20, b"FB"
_LARGEST_PLAIN_ENTRY = 1 << 30  # bytes of a zip entry; a larger one gets the fields of ZIP64
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


@dataclass(frozen=True)
class TensorType:
    """What is known of a tensor before its values: floating-point dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorStream(Protocol):
    """A file that takes its tensors in the order of its table, each in blocks of whole rows, first to last."""

    def append(self, name: str, block: torch.Tensor) -> None: ...

    def close(self) -> None:
        """End the file and put it on disk."""

    def abandon(self) -> None:
        """Let go of a file that is not to be finished."""


class SafetensorsStream:
    """A safetensors file. Raises OSError where it cannot be written.

    table  by name what the file will hold; wider dtypes come before narrower ones, so that all are aligned
    """

    def __init__(self, file: Path, table: Mapping[str, TensorType]):
        names = {dtype: name for name, dtype in STORED.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, kind in table.items():
            start, end = end, end + kind.nbytes
            assert kind.nbytes == 0 or start % kind.dtype.itemsize == 0, (name, start)
            header[name] = {"dtype": names[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._order = _Order(table)
        self._stream = file.open("wb", buffering=0)
        _write_all(self._stream, len(text).to_bytes(8, "little") + text)

    def append(self, name: str, block: torch.Tensor) -> None:
        self._order.take(name, block)
        _write_all(self._stream, _bytes_of(block))

    def close(self) -> None:
        self._order.end()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def abandon(self) -> None:
        self._stream.close()


class TorchStream:
    """A file of torch.save that holds {name: tensor}; torch.load reads it with weights_only, mapped or not.

    The format is a zip archive, nothing in it compressed: data.pkl has the dict, with a reference to data/N for the
    values of its N-th tensor (torch/serialization.py, _save). Raises OSError where it cannot be written.
    """

    def __init__(self, file: Path, table: Mapping[str, TensorType]):
        self._order = _Order(table)
        self._numbers = {name: number for number, name in enumerate(table)}
        self._root = file.stem
        self._stream = file.open("wb")
        self._zip = zipfile.ZipFile(self._stream, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._entry: Any = None
        self._place(".format_version", b"1")
        self._place(".storage_alignment", str(ALIGNMENT).encode())
        self._place("byteorder", b"little")
        self._place("data.pkl", _pickled_skeleton(table))
        self._place("version", b"3\n")

    def append(self, name: str, block: torch.Tensor) -> None:
        for begun in self._order.take(name, block):
            self._close_entry()
            self._entry = self._open(f"data/{self._numbers[begun]}", self._order.table[begun].nbytes)
        self._entry.write(_bytes_of(block))

    def close(self) -> None:
        self._order.end()
        self._close_entry()
        self._zip.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def abandon(self) -> None:
        self._zip.fp = None  # or it would write its directory when it is collected
        with contextlib.suppress(OSError):  # what is buffered is not wanted either
            self._stream.close()

    def _place(self, name: str, data: bytes) -> None:
        with self._open(name, len(data)) as entry:
            entry.write(data)

    def _open(self, name: str, size: int) -> Any:
        """Return a new entry whose bytes begin at a multiple of ALIGNMENT, by a field of padding in its header."""
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        large = size > _LARGEST_PLAIN_ENTRY
        start = self._stream.tell() + _HEADER_BYTES + len(info.filename) + large * _ZIP64_BYTES + 4
        padding = -start % ALIGNMENT
        info.extra = _PADDING_ID + padding.to_bytes(2, "little") + b"Z" * padding
        return self._zip.open(info, "w", force_zip64=large)

    def _close_entry(self) -> None:
        if self._entry is not None:
            self._entry.close()
            self._entry = None


class _Order:
    """That the blocks of a file are those that its table promises, in that order: anything else is our bug."""

    def __init__(self, table: Mapping[str, TensorType]):
        self.table = table
        self._names: Iterator[str] = iter(table)
        self._name: str | None = None
        self._left = 0

    def take(self, name: str, block: torch.Tensor) -> list[str]:
        """Return the tensors that begin with this block: its own, if it is the first."""
        begun: list[str] = []
        if self._left == 0:
            self._name = next(self._names, None)
            assert self._name == name, (self._name, name)
            self._left = self.table[name].numel
            begun = [name]
        kind = self.table[name]
        assert (self._name, block.dtype, tuple(block.shape[1:])) == (name, kind.dtype, kind.shape[1:]), (name, kind)
        assert 0 < block.numel() <= self._left, (name, block.shape, self._left)
        self._left -= block.numel()
        return begun

    def end(self) -> None:
        assert self._left == 0 and next(self._names, None) is None, (self._name, self._left)


def _bytes_of(block: torch.Tensor) -> memoryview:
    return block.contiguous().view(-1).view(torch.uint8).numpy().data


def _write_all(stream: io.RawIOBase, data: bytes | memoryview) -> None:
    """Write all of it: a plain write may take less than it is given (2 GB at most, or what still fits on the disk)."""
    done, view = 0, memoryview(data)
    while done < len(view):
        done += stream.write(view[done:])


# ---- data.pkl ----


@dataclass(frozen=True)
class _Storage:
    """Stands for the values of a tensor, which lie in data/{number}."""

    kind: TensorType
    number: int


class _Skeleton(pickle.Pickler):
    """Pickles a dict of _Storage as torch.save pickles a dict of tensors."""

    def persistent_id(self, value: Any) -> tuple | None:
        if isinstance(value, _Values):
            kind = value.storage.kind
            return ("storage", _STORAGES[kind.dtype], str(value.storage.number), "cpu", kind.numel)
        return None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return NotImplemented
        shape = value.kind.shape
        strides = torch.empty(shape, device="meta").stride()
        hooks: collections.OrderedDict[int, Any] = collections.OrderedDict()
        # storage, offset, size, stride, requires_grad, backward hooks
        arguments = (_Values(value), 0, shape, strides, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


@dataclass(frozen=True)
class _Values:
    storage: _Storage


def _pickled_skeleton(table: Mapping[str, TensorType]) -> bytes:
    buffer = io.BytesIO()
    storages = {name: _Storage(kind, number) for number, (name, kind) in enumerate(table.items())}
    _Skeleton(buffer, protocol=2).dump(storages)
    return buffer.getvalue()
