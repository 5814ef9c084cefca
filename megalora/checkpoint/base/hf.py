"""Base weights as Hugging Face writes them: safetensors, one file or several with an index, read by slice.

The safetensors library checks a file's header; the bytes are then read with plain reads, a block of rows at a
time. The pages of a mapped file would count in the resident memory of every rank, and an error of the disk
under a mapping kills the process.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megalora.errors import UserError
from megalora.files import check_regular, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 16 << 20
INDEX_BYTES = 64 << 20  # of the index: ten times that of the largest models
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Those of quantised weights and their scales too.
STORED = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32}


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors file: its dtype as the header spells it, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(file: Path) -> dict[str, Entry]:
    """Return every tensor of a safetensors file. Raises UserError where it is missing or damaged."""
    check_regular(file)
    try:
        with safe_open(file, framework="pt"):  # checks sizes, offsets and that the file is whole
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise UserError(f"{file}: does not exist", "download the model again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})", "check the file") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file}: is damaged or not safetensors ({error})", "download it again") from None
    header.pop("__metadata__", None)
    return {
        name: Entry(value["dtype"], tuple(value["shape"]), 8 + length + value["data_offsets"][0])
        for name, value in header.items()
    }


class HfWeights:
    """The tensors of an HF folder. `shapes` has every one of them, whole; `copy` reads a slice of one.

    Raises UserError for a folder that is missing or holds no safetensors, an index that is broken or names a
    file outside the folder, and a file that is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        # One buffer for all tensors: one for each would leave holes in the heap, which count in the peak.
        self._buffer = torch.empty(0, dtype=torch.uint8)
        files, self._files = _files_of(self.folder)
        self._entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if self._files.setdefault(name, file) == file:  # where two files hold it, the index decides
                    self._entries[name] = entry
        for name, file in self._files.items():
            if name not in self._entries:
                raise UserError(f"{file}: lacks {name}, which {INDEX} says it holds", "download the model again")
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def where(self, name: str) -> str:
        """Return the file that holds tensor `name`, for messages."""
        return str(self._files[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of tensor `name` in the file. Raises UserError for one that is not floating point."""
        dtype = self._entries[name].dtype
        if dtype not in DTYPES:
            raise UserError(f"{self.where(name)}: {name} has dtype {dtype}", f"use a model in {', '.join(DTYPES)}")
        return DTYPES[dtype]

    def stored(self, name: str) -> None:
        """Return None: a tensor here is what the file says, not a part of a quantised weight."""

    def kind(self, name: str) -> str:
        """Return the dtype of tensor `name` as the file spells it."""
        return self._entries[name].dtype

    def raw(self, name: str) -> torch.Tensor:
        """Return a whole tensor in the dtype of the file, for small ones of any dtype of STORED."""
        shape = self._entries[name].shape
        out = torch.empty(shape or (1,), dtype=self._stored_dtype(name))
        self.copy(name, tuple(slice(0, n) for n in out.shape), out)
        return out.view(shape)

    def _stored_dtype(self, name: str) -> torch.dtype:
        kind = self._entries[name].dtype
        if kind not in STORED:
            raise UserError(f"{self.where(name)}: {name} has dtype {kind}", f"use a model in {', '.join(DTYPES)}")
        return STORED[kind]

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copy `tensor[index]` into `out` (its shape; any dtype and device), one block of rows at a time.

        Whole rows are read even where `index` cuts them: a cut along dim 1 takes bytes from the whole tensor.
        """
        entry, dtype = self._entries[name], self._stored_dtype(name)
        if not entry.shape:  # a number, which is read as a row
            index, out = (slice(0, 1),), out.view(1)
        rows, columns, shape, offset = index[0], index[1:], entry.shape or (1,), entry.offset
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        while len(shape) > 2 and rows.stop - rows.start == 1:  # one of several in one tensor: rows of it
            offset, shape, out = offset + rows.start * row_bytes, shape[1:], out[0]
            rows, columns, row_bytes = columns[0], columns[1:], row_bytes // shape[0]
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        count = min(step, rows.stop - rows.start)
        if count * row_bytes > self._buffer.numel():
            self._buffer = torch.empty(max(BLOCK_BYTES, row_bytes), dtype=torch.uint8)
        block = self._buffer[: count * row_bytes].view(dtype).view(count, *shape[1:])
        block_bytes = self._buffer.numpy().data
        try:
            with open(self._files[name], "rb", buffering=0) as stream:
                for start in range(rows.start, rows.stop, step):
                    count = min(step, rows.stop - start)
                    stream.seek(offset + start * row_bytes)
                    _read_exactly(stream, block_bytes[: count * row_bytes])
                    place = start - rows.start
                    out[place : place + count].copy_(block[(slice(count), *columns)])
        except OSError as error:
            raise UserError(
                f"{self.where(name)}: {name} cannot be read ({error.strerror or error})", "check the file"
            ) from None


class AsStored(HfWeights):
    """The same with every tensor in the dtype of the file, parts of quantised weights too: to be copied bit for bit."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of tensor `name` in the file. Raises UserError for one that is not known."""
        return self._stored_dtype(name)


def _read_exactly(stream, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise OSError("it ends too early")
        done += count


def is_hf(folder: Path) -> bool:
    """Return whether the folder looks like one of HF weights, sound or not."""
    return any(folder.glob("model*.safetensors*")) or any(folder.glob("pytorch_model*.bin*"))


def _files_of(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the files of the weights, and the file of each tensor by the index (empty where there is none)."""
    if not folder.is_dir():
        raise UserError(f"base weights {folder}: is not a folder", "name a Hugging Face folder or one of shards")
    if (folder / SINGLE).exists():
        return [folder / SINGLE], {}
    if (folder / INDEX).exists():
        index = _read_index(folder)
        return sorted(set(index.values())), index
    if any(folder.glob("pytorch_model*.bin*")):
        raise UserError(
            f"base weights {folder}: holds pytorch_model.bin only, which is a pickle",
            "convert it to safetensors with transformers (load the model, then save_pretrained)",
        )
    if any(folder.glob("model*.safetensors")):
        raise UserError(f"base weights {folder}: lacks {INDEX}, which says what its files hold", "download it too")
    raise UserError(f"base weights {folder}: holds neither {SINGLE} nor {INDEX}", "name a Hugging Face folder")


def _read_index(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    weight_map = read_json(index, "download it again", most=INDEX_BYTES).get("weight_map")
    good = isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())
    if not good:
        raise UserError(f"{index}: weight_map must map tensor names to file names", "download it again")
    files = {name: _inside(folder, name, index) for name in dict.fromkeys(weight_map.values())}
    return {name: files[file] for name, file in weight_map.items()}


def _inside(folder: Path, name: str, index: Path) -> Path:
    """Return the file of the folder with that plain name; a link may lead only into the hub's own cache of blobs."""
    if name in ("", ".", "..") or "\0" in name or os.path.basename(name) != name or "\\" in name:
        raise UserError(f"{index}: names {name!r}, which is no file of the folder", "download the model again")
    file = folder / name
    try:
        file.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # ValueError: no name that a file can have
        raise UserError(f"{file}: does not exist, but {index.name} names it", "download the model again") from None
    check_stays(folder, file)
    return file


def check_stays(folder: Path, file: Path) -> None:
    """Raise UserError where a file of the folder is a link out of it, other than into the hub's own cache."""
    home, target = folder.resolve(), file.resolve()
    # The hub's cache keeps snapshots/<revision>/<file> as a link to blobs/<hash>.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not target.is_relative_to(home) and target.parent != blobs:
        raise UserError(f"{file}: is a link out of the folder, to {target}", "put the file itself there")
