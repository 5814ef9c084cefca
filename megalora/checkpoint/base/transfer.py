"""Base weights from one kind of folder into the files of another: planned first, then streamed.

Each tensor is read once, in blocks of rows, and each block goes to every file that holds a part of it; memory is a
block, whatever the model. Dtypes and bits are kept.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from megalora.checkpoint.base import hf
from megalora.checkpoint.base.shards import LAYOUT_FILE, layout_json
from megalora.checkpoint.base.source import BaseWeights
from megalora.checkpoint.base.streams import SafetensorsStream, TensorStream, TensorType, TorchStream
from megalora.checkpoint.layout import BASE_FILE, Layout
from megalora.files import write_file
from megalora.parallel.split import Split

BLOCK_BYTES = 16 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors to be written: its path below the folder, and which part of which tensors it will hold."""

    path: str
    parts: Mapping[str, Split]
    table: Mapping[str, TensorType]

    @property
    def nbytes(self) -> int:
        return sum(kind.nbytes for kind in self.table.values())

    @property
    def last(self) -> str:
        """The tensor that ends the file."""
        return next(reversed(list(self.parts)))

    def open(self, folder: Path) -> TensorStream:
        file = folder / self.path
        file.parent.mkdir(parents=True, exist_ok=True)
        return (TorchStream if file.suffix == ".pt" else SafetensorsStream)(file, self.table)


@dataclass(frozen=True)
class TransferPlan:
    """All that a folder of base weights will hold.

    tensors  every tensor, whole, in the order it is read
    files    the files of tensors
    texts    small files that go with them, by path below the folder
    """

    tensors: Mapping[str, TensorType]
    files: Sequence[TensorFile]
    texts: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files) + sum(map(len, self.texts.values()))


def tensor_types(weights: BaseWeights, order: Iterable[str]) -> dict[str, TensorType]:
    """Return every tensor of `weights`: wide dtypes first, then as `order` has them, what it lacks last by name.

    Raises UserError for a dtype that cannot be read.
    """
    place = {name: number for number, name in enumerate(order)}
    found = {name: TensorType(weights.dtype(name), tuple(shape)) for name, shape in weights.shapes.items()}
    names = sorted(found, key=lambda n: (-found[n].dtype.itemsize, place.get(n, len(place)), n))
    return {name: found[name] for name in names}


def plan_hf(tensors: Mapping[str, TensorType], max_file_bytes: int) -> TransferPlan:
    """Return one model.safetensors, or several files of at most `max_file_bytes` (or one tensor) each with their index.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, kind in tensors.items():
        if groups[-1] and size + kind.nbytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += kind.nbytes
    if len(groups) == 1:
        names = [hf.SINGLE]
    else:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    files = [
        TensorFile(name, {n: Split(tensors[n].shape) for n in group}, {n: tensors[n] for n in group})
        for name, group in zip(names, groups, strict=True)
    ]
    texts = {}
    if len(files) > 1:
        total = sum(kind.nbytes for kind in tensors.values())
        weight_map = {name: file.path for file in files for name in file.parts}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts[hf.INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return TransferPlan(tensors, files, texts)


def plan_shards(tensors: Mapping[str, TensorType], splits: Mapping[Layout, Mapping[str, Split]]) -> TransferPlan:
    """Return a shard for each place of the layout.

    splits  what lies there of which tensors; what no place has (rotary frequencies, an image tower) is whole on the
            first
    """
    files, texts = [], {}
    known = set().union(*splits.values())
    first = next(iter(splits))
    for layout, of_shard in splits.items():
        parts = {
            name: of_shard.get(name, Split(kind.shape))
            for name, kind in tensors.items()
            if name in of_shard or (name not in known and layout == first)
        }
        table = {name: TensorType(tensors[name].dtype, split.local_shape) for name, split in parts.items()}
        files.append(TensorFile(f"{layout.folder}/{BASE_FILE}", parts, table))
        texts[f"{layout.folder}/{LAYOUT_FILE}"] = layout_json(layout, parts)
    return TransferPlan(tensors, files, texts)


def transfer(weights: BaseWeights, plan: TransferPlan, folder: Path, progress: Callable[[int], None]) -> None:
    """Write what is planned into `folder`, which exists. `progress` is told bytes as they are written.

    Raises UserError where `weights` cannot be read, OSError where `folder` cannot be written.
    """
    streams: dict[str, TensorStream] = {}
    files: list[TensorFile] = []
    try:
        for name, rows, block in _one_ahead(_blocks(weights, plan.tensors)):
            if rows.start == 0:
                files = [file for file in plan.files if name in file.parts]
            for file in files:
                if file.path not in streams:
                    streams[file.path] = file.open(folder)
                part = _part(block, rows, file.parts[name])
                if part.numel():
                    streams[file.path].append(name, part)
                    progress(part.nbytes)
                if file.last == name and rows.stop == (plan.tensors[name].shape or (1,))[0]:
                    streams.pop(file.path).close()
    finally:
        for stream in streams.values():
            stream.abandon()
    for path, text in plan.texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / path, text)


def _row_bytes(kind: TensorType) -> int:
    return math.prod(kind.shape[1:]) * kind.dtype.itemsize


def _blocks(weights: BaseWeights, tensors: Mapping[str, TensorType]) -> Iterator[tuple[str, range, torch.Tensor]]:
    """Yield every tensor in blocks of rows: (name, rows, values), the values until the next but one is taken."""
    # Memory for two blocks of any tensor: new memory for each would leave holes in the heap.
    largest = max([BLOCK_BYTES, *map(_row_bytes, tensors.values())])
    buffers = itertools.cycle([torch.empty(largest, dtype=torch.uint8) for _ in range(2)])
    for name, kind in tensors.items():
        count, columns = (kind.shape or (1,))[0], kind.shape[1:]
        step = max(1, BLOCK_BYTES // max(1, _row_bytes(kind)))
        for start in range(0, count, step):
            rows = range(start, min(start + step, count))
            block = next(buffers)[: len(rows) * _row_bytes(kind)].view(kind.dtype).view(len(rows), *columns)
            weights.copy(name, (slice(rows.start, rows.stop), *(slice(0, n) for n in columns)), block)
            yield name, rows, block


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items; while one is worked on, the next is made in a thread (reading lets go of the interpreter).
    """
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _part(block: torch.Tensor, rows: range, split: Split) -> torch.Tensor:
    """Return what of a block of whole rows belongs to one part."""
    if split.dim is None:
        return block
    if split.dim > 0:
        parts = [block.narrow(split.dim, start, stop - start) for start, stop, _ in split.runs]
    else:
        parts = [block[max(0, a - rows.start) : max(0, b - rows.start)] for a, b, _ in split.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, split.dim)
