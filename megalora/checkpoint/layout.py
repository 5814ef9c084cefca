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
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from megalora.errors import UserError
from megalora.parallel.split import Split

BASE_FILE = "partial_model_optim.pt"
ADAPTER_FILE = "lora_partial_model_optim.pt"
FORMAT = 1
COPY_ALL = "copy all shards of one checkpoint"
T = TypeVar("T")
_MOST_RANKS = 1 << 16
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


def has_shards(folder: Path) -> bool:
    """Return whether the folder holds any folder named as a shard."""
    return folder.is_dir() and any(_FOLDER.fullmatch(child.name) for child in folder.iterdir())


def shard_files(folder: Path, name: str) -> dict[tuple[int, int], Path]:
    """Return the file `name` of every shard by (tp rank, pp rank); all ranks up to the highest must be there.

    Raises UserError that names the folder or file that is missing.
    """
    if not has_shards(folder):
        raise UserError(f"{folder}: holds no mp_rank_XX_pp_rank_YYY", "name the folder of the shards")
    found = [match for child in folder.iterdir() if (match := _FOLDER.fullmatch(child.name))]
    places = [(int(match[1]), int(match[2])) for match in found]
    tp, pp = (1 + max(ranks) for ranks in zip(*places, strict=True))
    files = {}
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            shard = Layout(tp, pp, tp_rank, pp_rank).folder
            if not (folder / shard / name).is_file():
                what = f"{shard}/{name}" if (folder / shard).is_dir() else shard
                raise UserError(f"{folder}: {what} is missing of {tp} x {pp} shards", "copy all of them")
            files[tp_rank, pp_rank] = folder / shard / name
    return files


def check_place(layout: Layout, tp_rank: int, pp_rank: int, files: Collection[tuple[int, int]], folder: Path) -> None:
    """Check that a shard lies where it was written, and that all others of its layout are there."""
    here = Layout(layout.tp, layout.pp, tp_rank, pp_rank)
    if layout != here:
        raise UserError(f"{folder}: {here.folder} was written as {layout.folder}", "give the folder that name again")
    for place in itertools.product(range(layout.tp), range(layout.pp)):
        if place not in files:
            shard = Layout(layout.tp, layout.pp, *place).folder
            raise UserError(f"{folder}: {shard} is missing of {layout.tp} x {layout.pp} shards", COPY_ALL)
    if len(files) != layout.tp * layout.pp:
        raise UserError(f"{folder}: {len(files)} shards lie where {layout.tp} x {layout.pp} were written", COPY_ALL)


# ---- what both kinds of shards are made of ----


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the CPU with a storage of its own: torch.save writes the whole storage of a view."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def chain(ranges: Iterable[tuple[int, int, T]]) -> tuple[list[tuple[int, int, T]], int]:
    """Return those of the ranges [start, stop) with values that cover 0 to an end, without overlap; and the end."""
    chain, end = [], 0
    for start, stop, value in sorted(ranges, key=lambda r: r[:2]):
        if start <= end < stop:
            chain.append((end, stop, value))
            end = stop
    return chain, end


def split_to(split: Split) -> dict[str, Any]:
    """Return the plain values that `split_from` reads."""
    place = {"global_shape": list(split.global_shape), "dim": split.dim}
    if len(split.runs) > 1:
        return place | {"pieces": [list(piece) for piece in split.pieces]}
    start, stop, _ = split.runs[0] if split.runs else (0, 0, 0)
    return place | {"start": start, "stop": stop}


def typed(value: Any, kind: type | tuple[type, ...]) -> Any:
    """Return the value, if of that type. Raises TypeError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is a {type(value).__name__}")
    return value


def split_from(value: Any) -> Split:
    """Return the Split of values that `split_to` gave. Raises TypeError, KeyError or ValueError for any others."""
    shape, dim = tuple(typed(n, int) for n in typed(value["global_shape"], list)), value["dim"]
    if dim is None:
        return Split(shape)
    if not 0 <= typed(dim, int) < len(shape):
        raise ValueError(f"dimension {dim} of {shape}")
    if "pieces" in value:
        pieces = tuple(tuple(typed(n, int) for n in typed(piece, list)) for piece in typed(value["pieces"], list))
    else:
        start, stop = typed(value["start"], int), typed(value["stop"], int)
        pieces = ((start, 1, stop - start, 0),)
    for piece in pieces:
        start, count, block, stride = piece
        last = start + max(0, count - 1) * stride + block
        if min(piece) < 0 or last > shape[dim] or count > shape[dim]:
            raise ValueError(f"pieces {piece} along {dim} of {shape}")
    return Split(shape, dim, pieces)


def layout_from(value: Any) -> Layout:
    layout = Layout(**{key: typed(number, int) for key, number in value.items()})
    if not (0 <= layout.tp_rank < layout.tp <= _MOST_RANKS and 0 <= layout.pp_rank < layout.pp <= _MOST_RANKS):
        raise ValueError(f"{layout}")
    return layout
