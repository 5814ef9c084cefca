"""Base weights in shards: where each part lies, and slices of the whole tensors, whichever layout wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megalora.checkpoint.disk import unpickled
from megalora.checkpoint.layout import (
    BASE_FILE,
    COPY_ALL,
    FORMAT,
    Layout,
    chain,
    check_place,
    compact,
    layout_from,
    shard_files,
    split_from,
    split_to,
)
from megalora.errors import UserError
from megalora.files import read_json, write_file
from megalora.parallel.split import Split

LAYOUT_FILE = "layout.json"
LAYOUT_BYTES = 64 << 20  # of layout.json, which lists every tensor
MAPPED_BYTES = 64 << 20


def save_base_shards(folder: str | Path, module: nn.Module, splits: Mapping[str, Split], layout: Layout) -> Path:
    """Write the base parameters of this rank's stage; return the shard's folder. Raises UserError."""
    shard = Path(folder) / layout.folder
    state = {n: compact(p) for n, p in module.named_parameters() if "lora_" not in n}
    try:
        shard.mkdir(parents=True, exist_ok=True)
        write_file(shard / LAYOUT_FILE, layout_json(layout, {n: splits[n] for n in state}))
        write_file(shard / BASE_FILE, lambda stream: torch.save(state, stream))
    except (OSError, RuntimeError) as error:  # torch.save has its own words for a full disk
        raise UserError(f"{shard}: cannot be written ({error})", "free space, or name another folder") from None
    return shard


def layout_json(layout: Layout, splits: Mapping[str, Split]) -> bytes:
    """Return the contents of layout.json beside the base shard of that layout, which holds these parts."""
    places = {name: split_to(split) for name, split in splits.items()}
    return json.dumps({"format": FORMAT, "layout": vars(layout), "splits": places}).encode()


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor in one shard: the range of the whole read from it, and where the part begins."""

    file: Path
    index: tuple[slice, ...]
    origin: tuple[int, ...]


class BaseShards:
    """The tensors of base shards, whichever layout wrote them. `shapes` are whole; `copy` reads a slice.

    expected  the whole shape of each tensor of the model, for shards that do not say where their parts lie
    Raises UserError for a shard that is missing, damaged, or whose parts do not make up the whole.
    """

    def __init__(self, folder: str | Path, expected: Mapping[str, tuple[int, ...]]):
        self.folder = Path(folder)
        self._mapped: dict[Path, dict[str, torch.Tensor]] = {}
        self._touched = 0
        self._dtypes: dict[str, torch.dtype] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        parts: dict[str, dict[Path, tuple[int, ...]]] = {}
        files = shard_files(self.folder, BASE_FILE)
        for file in files.values():
            for name, tensor in self._open(file).items():
                parts.setdefault(name, {})[file] = tuple(tensor.shape)
                self._dtypes[name] = tensor.dtype
        written = {file: _read_layout(file.with_name(LAYOUT_FILE)) for file in files.values() if _has_layout(file)}
        for (tp_rank, pp_rank), file in files.items():
            if file in written:
                check_place(written[file][0], tp_rank, pp_rank, files, self.folder)
        tp = 1 + max(tp_rank for tp_rank, _ in files)
        for name, shapes in parts.items():
            if all(file in written for file in shapes):
                splits = {file: written[file][1].get(name) for file in shapes}
            else:
                splits = self._inferred(name, shapes, expected.get(name), tp)
            self._place(name, shapes, splits)

    def where(self, name: str) -> str:
        """Return the file that holds the first part of tensor `name`, for messages."""
        return str(self._pieces[name][0].file)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of tensor `name`. Raises UserError for one that is not floating point."""
        if not self._dtypes[name].is_floating_point:
            raise UserError(f"{self.where(name)}: {name} is {self._dtypes[name]}", "use an unquantised model")
        return self._dtypes[name]

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copy `tensor[index]` into `out` (its shape; any dtype and device), block by block."""
        for piece in self._pieces[name]:
            if not piece.index:  # a number, which is read as a row
                out.copy_(self._open(piece.file)[name])
                continue
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(piece.index, index, strict=True)]
            if any(s.start >= s.stop for s in both):
                continue
            source = tuple(slice(s.start - o, s.stop - o) for s, o in zip(both, piece.origin, strict=True))
            target = tuple(slice(s.start - a.start, s.stop - a.start) for s, a in zip(both, index, strict=True))
            self._copy_rows(name, piece.file, source, out[target])

    def stored(self, name: str) -> None:
        """Return None: shards hold no quantised weights."""

    def _copy_rows(self, name: str, file: Path, index: tuple[slice, ...], out: torch.Tensor) -> None:
        rows, done = out.shape[0], 0
        while done < rows:
            tensor = self._open(file)[name]
            row_bytes = max(1, tensor[0].numel() * tensor.itemsize)
            count = min(rows - done, max(1, (MAPPED_BYTES - self._touched) // row_bytes))
            start = index[0].start + done
            out[done : done + count].copy_(tensor[(slice(start, start + count), *index[1:])])
            done += count
            self._touched += count * row_bytes
            del tensor
            if self._touched >= MAPPED_BYTES:  # pages of a mapped file stay in memory until it is unmapped
                self._mapped, self._touched = {}, 0

    def _open(self, file: Path) -> dict[str, torch.Tensor]:
        if file not in self._mapped:
            state = unpickled(file, mmap=True)
            flat = isinstance(state, dict) and all(
                isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
            )
            if not flat:
                raise UserError(f"{file}: is not a flat dict of tensors by name", "name the shards of a base model")
            self._mapped[file] = state
        return self._mapped[file]

    def _place(self, name: str, parts: Mapping[Path, tuple[int, ...]], splits: Mapping[Path, Split | None]) -> None:
        """Note which part the entries of a tensor are read from."""
        first = next(iter(splits.values()))
        for file, split in splits.items():
            if split is None or split.local_shape != parts[file]:
                raise UserError(f"{file}: {name} {list(parts[file])} is not as {LAYOUT_FILE} says", COPY_ALL)
            if (split.global_shape, split.dim) != (first.global_shape, first.dim):
                raise UserError(f"{file}: {name} {list(parts[file])} does not fit the other shards", COPY_ALL)
        shape, dim = first.global_shape, first.dim
        self.shapes[name] = shape
        if dim is None:
            self._pieces[name] = [_Piece(next(iter(splits)), tuple(slice(0, n) for n in shape), (0,) * len(shape))]
            return
        runs = [(start, stop, (file, start - at)) for file, s in splits.items() for start, stop, at in s.runs]
        covered, end = chain(runs)
        if end != shape[dim]:
            raise UserError(f"{self.folder}: no shard holds {name} from entry {end} of {shape[dim]}", COPY_ALL)
        self._pieces[name] = [
            _Piece(
                file,
                tuple(slice(start, stop) if d == dim else slice(0, n) for d, n in enumerate(shape)),
                tuple(origin if d == dim else 0 for d in range(len(shape))),
            )
            for start, stop, (file, origin) in covered
        ]

    def _inferred(
        self, name: str, parts: Mapping[Path, tuple[int, ...]], whole: tuple[int, ...] | None, tp: int
    ) -> dict[Path, Split]:
        """Return where parts lie that do not say so: one after another by rank, each on one rank or on several."""
        sizes = list(parts.values())
        shape = tuple(whole) if whole is not None else sizes[0]
        cut = None
        if all(len(size) == len(shape) for size in sizes):
            cut = [dim for dim in range(len(shape)) if any(size[dim] != shape[dim] for size in sizes)]
        if cut == []:
            return dict.fromkeys(parts, Split(shape))
        lengths = [size[cut[0]] for size in sizes] if cut is not None and len(cut) == 1 else []
        copies = _copies(lengths, shape[cut[0]]) if len(lengths) == tp else None
        if copies is None:
            raise UserError(
                f"{self.folder}: {name} has shapes {[list(size) for size in sizes]}, which are no parts of "
                f"the {list(shape)} that config.json means",
                "copy all shards, and their model's config.json",
            )
        splits, start = {}, 0
        for i, (file, length) in enumerate(zip(parts, lengths, strict=True)):
            splits[file] = Split.range(shape, cut[0], start, start + length)
            if (i + 1) % copies == 0:
                start += length
        return splits


def _copies(lengths: list[int], size: int) -> int | None:
    """Return on how many ranks in a row each part is, from their lengths by rank; None where it is not clear."""
    if sum(lengths) == size:
        return 1
    length = lengths[0]
    alike = len(set(lengths)) == 1 and length > 0 and size % length == 0 and sum(lengths) % size == 0
    return sum(lengths) // size if alike else None


def _has_layout(file: Path) -> bool:
    return file.with_name(LAYOUT_FILE).exists()


def _read_layout(file: Path) -> tuple[Layout, dict[str, Split]]:
    """Return what `save_base_shards` wrote beside a shard."""
    try:
        data = read_json(file, COPY_ALL, most=LAYOUT_BYTES)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, but this version reads {FORMAT}")
        return layout_from(data["layout"]), {name: split_from(v) for name, v in data["splits"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: does not say where the parts lie ({error!r})", COPY_ALL) from None
