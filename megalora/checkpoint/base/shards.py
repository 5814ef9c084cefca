"""Shards: a folder `mp_rank_XX_pp_rank_YYY` for each tp rank XX and pp rank YYY, readable at any layout.

    mp_rank_00_pp_rank_000/partial_model_optim.pt        base: {HF name: this rank's part}
    mp_rank_00_pp_rank_000/layout.json                   base: where the parts lie
    mp_rank_00_pp_rank_000/lora_config.json              adapters: the fields of PEFT's adapter_config.json
    mp_rank_00_pp_rank_000/lora_partial_model_optim.pt   adapters: see `save_adapter`

Parts may overlap: a KV head that several tp ranks read is on each of them. Base shards without layout.json
are read where the shapes leave no doubt.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from megalora.checkpoint.disk import save_tensors, unpickled
from megalora.errors import UserError
from megalora.files import read_json, write_file
from megalora.parallel.split import Split

BASE_FILE = "partial_model_optim.pt"
ADAPTER_FILE = "lora_partial_model_optim.pt"
CONFIG_FILE = "lora_config.json"
LAYOUT_FILE = "layout.json"
FORMAT = 1
MAPPED_BYTES = 64 << 20
T = TypeVar("T")
_MOST_RANKS = 1 << 16
_COPY_ALL = "copy all shards of one checkpoint"
_FOLDER = re.compile(r"mp_rank_(\d{2,})_pp_rank_(\d{3,})")


@dataclass(frozen=True)
class Layout:
    """The place of one shard: its tp and pp rank among `tp` x `pp`."""

    tp: int = 1
    pp: int = 1
    tp_rank: int = 0
    pp_rank: int = 0

    @property
    def folder(self) -> str:
        return f"mp_rank_{self.tp_rank:02d}_pp_rank_{self.pp_rank:03d}"


@dataclass(frozen=True)
class AdapterCheckpoint:
    """An adapter as a whole, whatever layout or library wrote it.

    lora_config  fields of PEFT's adapter_config.json (for LoraConfig.from_dict)
    tensors      whole, on the CPU, by parameter name: lora_A [r, in], lora_B [out, r], trained biases [out]
    optimizer    by parameter name its moments, whole, by name ("exp_avg", "exp_avg_sq"); None: not saved
    trainer      the plain values that the run saved beside (step, ...); None: not saved
    where        the folder it was read from, for messages
    notes        one line for each damaged checkpoint that was passed over to find this one
    """

    lora_config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]] | None = None
    trainer: dict[str, Any] | None = None
    where: str = ""
    notes: tuple[str, ...] = ()


def has_shards(folder: Path) -> bool:
    """Whether the folder holds any folder named as a shard."""
    return folder.is_dir() and any(_FOLDER.fullmatch(child.name) for child in folder.iterdir())


def shard_files(folder: Path, name: str) -> dict[tuple[int, int], Path]:
    """The file `name` of every shard by (tp rank, pp rank); all ranks up to the highest must be there.

    Raises UserError that names the folder or file that is missing.
    """
    if not has_shards(folder):
        raise UserError(f"{folder}: holds no mp_rank_XX_pp_rank_YYY: name the folder of the shards")
    found = [match for child in folder.iterdir() if (match := _FOLDER.fullmatch(child.name))]
    places = [(int(match[1]), int(match[2])) for match in found]
    tp, pp = (1 + max(ranks) for ranks in zip(*places, strict=True))
    files = {}
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            shard = Layout(tp, pp, tp_rank, pp_rank).folder
            if not (folder / shard / name).is_file():
                what = f"{shard}/{name}" if (folder / shard).is_dir() else shard
                raise UserError(f"{folder}: {what} is missing of {tp} x {pp} shards: copy all of them")
            files[tp_rank, pp_rank] = folder / shard / name
    return files


# ---- base ----


def save_base_shards(folder: str | Path, module: nn.Module, splits: Mapping[str, Split], layout: Layout) -> Path:
    """Writes the base parameters of this rank's stage; returns the shard's folder. Raises UserError."""
    shard = Path(folder) / layout.folder
    state = {n: _compact(p) for n, p in module.named_parameters() if "lora_" not in n}
    try:
        shard.mkdir(parents=True, exist_ok=True)
        write_file(shard / LAYOUT_FILE, layout_json(layout, {n: splits[n] for n in state}))
        write_file(shard / BASE_FILE, lambda stream: torch.save(state, stream))
    except (OSError, RuntimeError) as error:  # torch.save has its own words for a full disk
        raise UserError(f"{shard}: cannot be written ({error}): free space, or name another folder") from None
    return shard


def layout_json(layout: Layout, splits: Mapping[str, Split]) -> bytes:
    """The contents of layout.json beside the base shard of that layout, which holds these parts."""
    places = {name: _split_to(split) for name, split in splits.items()}
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
                _check_place(written[file][0], tp_rank, pp_rank, files, self.folder)
        tp = 1 + max(tp_rank for tp_rank, _ in files)
        for name, shapes in parts.items():
            if all(file in written for file in shapes):
                splits = {file: written[file][1].get(name) for file in shapes}
            else:
                splits = self._inferred(name, shapes, expected.get(name), tp)
            self._place(name, shapes, splits)

    def where(self, name: str) -> str:
        """The file that holds the first part of tensor `name`, for messages."""
        return str(self._pieces[name][0].file)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor `name`. Raises UserError for one that is not floating point."""
        if not self._dtypes[name].is_floating_point:
            raise UserError(f"{self.where(name)}: {name} is {self._dtypes[name]}: use an unquantised model")
        return self._dtypes[name]

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copies `tensor[index]` into `out` (its shape; any dtype and device), block by block."""
        for piece in self._pieces[name]:
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(piece.index, index, strict=True)]
            if any(s.start >= s.stop for s in both):
                continue
            source = tuple(slice(s.start - o, s.stop - o) for s, o in zip(both, piece.origin, strict=True))
            target = tuple(slice(s.start - a.start, s.stop - a.start) for s, a in zip(both, index, strict=True))
            self._copy_rows(name, piece.file, source, out[target])

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
                raise UserError(f"{file}: is not a flat dict of tensors by name: name the shards of a base model")
            self._mapped[file] = state
        return self._mapped[file]

    def _place(self, name: str, parts: Mapping[Path, tuple[int, ...]], splits: Mapping[Path, Split | None]) -> None:
        """Which part the entries of a tensor are read from."""
        first = next(iter(splits.values()))
        for file, split in splits.items():
            if split is None or split.local_shape != parts[file]:
                raise UserError(f"{file}: {name} {list(parts[file])} is not as {LAYOUT_FILE} says: {_COPY_ALL}")
            if (split.global_shape, split.dim) != (first.global_shape, first.dim):
                raise UserError(f"{file}: {name} {list(parts[file])} does not fit the other shards: {_COPY_ALL}")
        shape, dim = first.global_shape, first.dim
        self.shapes[name] = shape
        if dim is None:
            whole = tuple(slice(0, n) for n in shape)
            self._pieces[name] = [_Piece(next(iter(splits)), whole, (0,) * len(shape))]
            return
        runs = [(start, stop, (file, start - at)) for file, s in splits.items() for start, stop, at in s.runs]
        chain, end = _chain(runs)
        if end != shape[dim]:
            raise UserError(f"{self.folder}: no shard holds {name} from entry {end} of {shape[dim]}: {_COPY_ALL}")
        self._pieces[name] = [
            _Piece(
                file,
                tuple(slice(start, stop) if d == dim else slice(0, n) for d, n in enumerate(shape)),
                tuple(origin if d == dim else 0 for d in range(len(shape))),
            )
            for start, stop, (file, origin) in chain
        ]

    def _inferred(
        self, name: str, parts: Mapping[Path, tuple[int, ...]], whole: tuple[int, ...] | None, tp: int
    ) -> dict[Path, Split]:
        """Where parts lie that do not say so: one after another by rank, each on one rank or on several."""
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
                f"the {list(shape)} that config.json means: copy all shards, and their model's config.json"
            )
        splits, start = {}, 0
        for i, (file, length) in enumerate(zip(parts, lengths, strict=True)):
            splits[file] = Split.range(shape, cut[0], start, start + length)
            if (i + 1) % copies == 0:
                start += length
        return splits


def _copies(lengths: list[int], size: int) -> int | None:
    """On how many ranks in a row each part is, from their lengths by rank; None where it is not clear."""
    if sum(lengths) == size:
        return 1
    length = lengths[0]
    alike = len(set(lengths)) == 1 and length > 0 and size % length == 0 and sum(lengths) % size == 0
    return sum(lengths) // size if alike else None


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU with a storage of its own: torch.save writes the whole storage of a view."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _has_layout(file: Path) -> bool:
    return file.with_name(LAYOUT_FILE).exists()


def _read_layout(file: Path) -> tuple[Layout, dict[str, Split]]:
    """What `save_base_shards` wrote beside a shard."""
    try:
        data = read_json(file)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, but this version reads {FORMAT}")
        return _layout_from(data["layout"]), {name: _split_from(v) for name, v in data["splits"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: does not say where the parts lie ({error!r}): {_COPY_ALL}") from None


def _chain(ranges: Iterable[tuple[int, int, T]]) -> tuple[list[tuple[int, int, T]], int]:
    """Of ranges [start, stop) with values, those that cover 0 to an end, without overlap; and the end."""
    chain, end = [], 0
    for start, stop, value in sorted(ranges, key=lambda r: r[:2]):
        if start <= end < stop:
            chain.append((end, stop, value))
            end = stop
    return chain, end


def _split_to(split: Split) -> dict[str, Any]:
    """The plain values that `_split_from` reads."""
    place = {"global_shape": list(split.global_shape), "dim": split.dim}
    if len(split.runs) > 1:
        return place | {"pieces": [list(piece) for piece in split.pieces]}
    start, stop, _ = split.runs[0] if split.runs else (0, 0, 0)
    return place | {"start": start, "stop": stop}


def _of(value: Any, kind: type | tuple[type, ...]) -> Any:
    """The value, if of that type. Raises TypeError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is a {type(value).__name__}")
    return value


def _split_from(value: Any) -> Split:
    shape, dim = tuple(_of(n, int) for n in _of(value["global_shape"], list)), value["dim"]
    if dim is None:
        return Split(shape)
    if not 0 <= _of(dim, int) < len(shape):
        raise ValueError(f"dimension {dim} of {shape}")
    if "pieces" in value:
        pieces = tuple(tuple(_of(n, int) for n in _of(piece, list)) for piece in _of(value["pieces"], list))
    else:
        start, stop = _of(value["start"], int), _of(value["stop"], int)
        pieces = ((start, 1, stop - start, 0),)
    for piece in pieces:
        start, count, block, stride = piece
        ends = (start, start + max(0, count - 1) * stride + block)
        if min(*piece, count * block) < 0 or max(ends) > shape[dim] or count > shape[dim]:
            raise ValueError(f"pieces {piece} along {dim} of {shape}")
    return Split(shape, dim, pieces)


def _layout_from(value: Any) -> Layout:
    layout = Layout(**{key: _of(number, int) for key, number in value.items()})
    if not (0 <= layout.tp_rank < layout.tp <= _MOST_RANKS and 0 <= layout.pp_rank < layout.pp <= _MOST_RANKS):
        raise ValueError(f"{layout}")
    return layout


# ---- adapters ----


def save_adapter(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor],
    splits: Mapping[str, Split],
    layout: Layout,
    lora_config: Mapping[str, Any],
    optimizer: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Path:
    """Writes this rank's part of an adapter and fsyncs it; returns the shard's folder. Raises OSError.

    tensors    local part of each trained parameter, by name; `splits` says where it lies
    optimizer  by the same names, moments of the same local shapes; None on all ranks or on none
    trainer    plain values (numbers, strings, lists, dicts), the same on every rank
    The file is {"format", "layout": {tp, pp, tp_rank, pp_rank}, "model": {name: part},
    "splits": {name: {global_shape, dim, start, stop}} (where a part is several ranges, for start and stop a list of
    pieces, [start, count, block, stride] each), "optimizer": {name: {"exp_avg": part, ...}} or None,
    "trainer": {...} or None}.
    """

    def local(name: str, tensor: torch.Tensor) -> torch.Tensor:
        assert tuple(tensor.shape) == splits[name].local_shape, (name, tensor.shape, splits[name])
        return _compact(tensor)

    payload = {
        "format": FORMAT,
        "layout": dict(vars(layout)),
        "model": {name: local(name, tensor) for name, tensor in tensors.items()},
        "splits": {name: _split_to(splits[name]) for name in tensors},
        "optimizer": None
        if optimizer is None
        else {name: {k: local(name, v) for k, v in moments.items()} for name, moments in optimizer.items()},
        "trainer": None if trainer is None else dict(trainer),
    }
    shard = Path(folder) / layout.folder
    shard.mkdir(parents=True, exist_ok=True)
    config = json.dumps(dict(lora_config), indent=2, sort_keys=True, ensure_ascii=False)
    write_file(shard / CONFIG_FILE, config.encode())
    write_file(shard / ADAPTER_FILE, lambda stream: save_tensors(payload, stream))
    return shard


def read_adapter(folder: str | Path) -> AdapterCheckpoint:
    """The whole adapter from all of its shards. Raises UserError that names the file or folder at fault."""
    folder = Path(folder)
    files = shard_files(folder, ADAPTER_FILE)
    shards = {file: _checked(unpickled(file), file) for file in files.values()}
    for (tp_rank, pp_rank), file in files.items():
        _check_place(shards[file].layout, tp_rank, pp_rank, files, folder)
    first = next(iter(shards.values()))
    model: dict[str, list[_Part]] = {}
    moments: dict[str, dict[str, list[_Part]]] = {}
    for file, shard in shards.items():
        # By repr, because a NaN among the values is not equal to itself.
        one_save = repr(shard.trainer) == repr(first.trainer)
        if not one_save or (shard.optimizer is None) != (first.optimizer is None):
            raise UserError(f"{file}: is of another checkpoint than its neighbours: {_COPY_ALL}")
        for name, tensor in shard.model.items():
            model.setdefault(name, []).append(_Part(file, shard.splits[name], tensor))
        for name, state in (shard.optimizer or {}).items():
            for key, tensor in state.items():
                moments.setdefault(name, {}).setdefault(key, []).append(_Part(file, shard.splits[name], tensor))
    optimizer = {name: {k: _joined(name, p) for k, p in state.items()} for name, state in moments.items()}
    return AdapterCheckpoint(
        lora_config=read_json(next(iter(files.values())).with_name(CONFIG_FILE)),
        tensors={name: _joined(name, parts) for name, parts in model.items()},
        optimizer=None if first.optimizer is None else optimizer,
        trainer=first.trainer,
        where=str(folder),
    )


@dataclass(frozen=True)
class _Shard:
    """The contents of one adapter file, checked (see `save_adapter`)."""

    layout: Layout
    model: dict[str, torch.Tensor]
    splits: dict[str, Split]
    optimizer: dict[str, dict[str, torch.Tensor]] | None
    trainer: dict[str, Any] | None


@dataclass(frozen=True)
class _Part:
    file: Path
    split: Split
    tensor: torch.Tensor


def _check_place(layout: Layout, tp_rank: int, pp_rank: int, files: Collection[tuple[int, int]], folder: Path) -> None:
    """That a shard lies where it was written, and that all others of its layout are there."""
    here = Layout(layout.tp, layout.pp, tp_rank, pp_rank)
    if layout != here:
        raise UserError(f"{folder}: {here.folder} was written as {layout.folder}: give the folder that name again")
    for place in itertools.product(range(layout.tp), range(layout.pp)):
        if place not in files:
            shard = Layout(layout.tp, layout.pp, *place).folder
            raise UserError(f"{folder}: {shard} is missing of {layout.tp} x {layout.pp} shards: {_COPY_ALL}")
    if len(files) != layout.tp * layout.pp:
        raise UserError(f"{folder}: {len(files)} shards lie where {layout.tp} x {layout.pp} were written: {_COPY_ALL}")


def _joined(name: str, parts: list[_Part]) -> torch.Tensor:
    """The whole tensor; ranks that hold the same part agree, so that any of them serves."""
    first = parts[0]
    whole, dim = first.split.global_shape, first.split.dim
    for part in parts:
        fits = (part.split.global_shape, part.split.dim) == (whole, dim)
        if not fits or part.tensor.dtype != first.tensor.dtype or tuple(part.tensor.shape) != part.split.local_shape:
            raise UserError(f"{part.file}: {name} {list(part.tensor.shape)} does not fit the other shards: {_COPY_ALL}")
    if dim is None:
        return first.tensor
    chain, end = _chain([(a, b, (part, a - at)) for part in parts for a, b, at in part.split.runs])
    if end != whole[dim]:
        folder = first.file.parent.parent
        raise UserError(f"{folder}: no shard holds {name} from entry {end} of {whole[dim]}: {_COPY_ALL}")
    return torch.cat([p.tensor.narrow(dim, a - origin, b - a) for a, b, (p, origin) in chain], dim)


def _checked(payload: Any, file: Path) -> _Shard:
    """What `save_adapter` wrote, or UserError: the payload may be any value at all."""

    def tensors(value: Any) -> dict[str, torch.Tensor]:
        return {_of(name, str): _of(tensor, torch.Tensor) for name, tensor in _of(value, dict).items()}

    try:
        if _of(payload, dict)["format"] != FORMAT:
            raise ValueError(f"format {payload['format']!r}, but this version reads {FORMAT}")
        model, moments = tensors(payload["model"]), payload["optimizer"]
        shard = _Shard(
            layout=_layout_from(payload["layout"]),
            model=model,
            splits={name: _split_from(payload["splits"][name]) for name in model},
            optimizer=None if moments is None else {_of(n, str): tensors(v) for n, v in _of(moments, dict).items()},
            trainer=_of(payload["trainer"], (dict, type(None))),
        )
        if not set(shard.optimizer or ()) <= set(model):
            raise ValueError(f"optimizer state of {min(set(shard.optimizer or ()) - set(model))}, which is not there")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: is no adapter shard of megalora ({error!r}): name a run or a checkpoint") from None
    return shard
