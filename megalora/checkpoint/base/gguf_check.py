"""What a GGUF file claims, held against its size before anything is made of it.

The reader of the gguf package believes the counts in a file: 150 bytes that claim 2**40 values would keep it busy
without end. Layout: magic, version, counts of tensors and fields; of each field its name, type and value; of each
tensor its name, dimensions, type and offset (ggml's specification, versions 2 and 3).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from pathlib import Path

from megalora.files import check_regular

_SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)  # of a value of each type; 8 is text, 9 a list
_TEXT, _LIST = 8, 9
_MOST_FIELDS, _MOST_TENSORS, _MOST_DIMENSIONS = 1 << 12, 1 << 17, 4
_MOST_LISTED = 1 << 22  # texts of a list: a vocabulary


class Untrue(ValueError):
    """A claim of the file that cannot be true."""


class _Bytes:
    """The bytes of a file in order. Raises Untrue beyond its end."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self._data[self._at - count : self._at]

    def skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise Untrue(f"it claims {count:,} bytes at {self._at:,} of {len(self._data):,}")
        self._at += count

    def number(self, size: int = 8) -> int:
        return int.from_bytes(self.take(size), "little")

    def value(self, kind: int) -> None:
        """Pass over a value."""
        if kind == _TEXT:
            self.skip(self.number())
        elif kind == _LIST:
            of, count = self.number(4), self.number()
            if of == _TEXT:
                if count > _MOST_LISTED:
                    raise Untrue(f"a list of {count:,} texts")
                for _ in range(count):
                    self.skip(self.number())
            else:
                self.skip(count * self._size(of))
        else:
            self.skip(self._size(kind))

    def _size(self, kind: int) -> int:
        if kind >= len(_SIZES) or not _SIZES[kind]:
            raise Untrue(f"a value of type {kind}")
        return _SIZES[kind]


def check_claims(file: Path) -> None:
    """Raise Untrue where a GGUF file does not hold what it claims; OSError, and UserError for no regular file."""
    check_regular(file)
    with file.open("rb") as stream:
        if not stream.read(1):
            raise Untrue("it is empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(_Bytes(data), len(data))


def _check(data: _Bytes, nbytes: int) -> None:
    if data.take(4) != b"GGUF":
        raise Untrue("it does not begin with GGUF")
    if (version := data.number(4)) not in (2, 3):
        raise Untrue(f"version {version}")
    tensors, fields = data.number(), data.number()
    if tensors > _MOST_TENSORS or fields > _MOST_FIELDS:
        raise Untrue(f"{tensors:,} tensors and {fields:,} fields")
    for _ in range(fields):
        data.skip(data.number())
        data.value(data.number(4))
    for _ in range(tensors):
        data.skip(data.number())
        dimensions = data.number(4)
        if dimensions > _MOST_DIMENSIONS:
            raise Untrue(f"a tensor of {dimensions:,} dimensions")
        numel = math.prod(data.number() for _ in range(dimensions))
        data.skip(4)
        if numel > 8 * nbytes:  # no format has less than a bit a weight
            raise Untrue(f"a tensor of {numel:,} numbers")
        data.skip(8)


def check_sizes(sizes: Iterable[tuple[str, object]], numel: int, tensors: int) -> None:
    """Raise Untrue where a size that the metadata gives is larger than all tensors of the file together.

    sizes  (name, value) of fields; block_count is held against the number of tensors
    """
    for name, value in sizes:
        most = tensors if name.endswith(".block_count") else numel
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise Untrue(f"{name} = {value!r:.80}")
