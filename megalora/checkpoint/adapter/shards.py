"""Adapters in shards: what each rank writes of a checkpoint, and the whole adapter from all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalora.checkpoint.disk import save_tensors, unpickled
from megalora.checkpoint.layout import (
    ADAPTER_FILE,
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
    typed,
)
from megalora.errors import UserError
from megalora.files import read_json, write_file
from megalora.parallel.split import Split

CONFIG_FILE = "lora_config.json"


@dataclass(frozen=True)
class AdapterCheckpoint:
    """An adapter as a whole, whatever layout or library wrote it.

    lora_config  fields of PEFT's adapter_config.json (for LoraConfig.from_dict)
    tensors      whole, on the CPU, by parameter name: lora_A [r, in], lora_B [out, r], trained biases [out]
    optimizer    by parameter name its moments, whole, by name ("exp_avg", "exp_avg_sq"); None: not saved
    trainer      the plain values that the run saved beside (step, ...); None: not saved
    where        the folder it was read from, for messages
    notes        one line for each damaged checkpoint that was passed over to find this one
    base_format  of the base that it was trained on, where a PEFT folder says so (a run says it in `trainer`)
    """

    lora_config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]] | None = None
    trainer: dict[str, Any] | None = None
    where: str = ""
    notes: tuple[str, ...] = ()
    base_format: str | None = None


def save_adapter(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor],
    splits: Mapping[str, Split],
    layout: Layout,
    lora_config: Mapping[str, Any],
    optimizer: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Path:
    """Write this rank's part of an adapter and fsync it; return the shard's folder. Raises OSError.

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
        return compact(tensor)

    payload = {
        "format": FORMAT,
        "layout": dict(vars(layout)),
        "model": {name: local(name, tensor) for name, tensor in tensors.items()},
        "splits": {name: split_to(splits[name]) for name in tensors},
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
    """Return the whole adapter from all of its shards. Raises UserError that names the file or folder at fault."""
    folder = Path(folder)
    files = shard_files(folder, ADAPTER_FILE)
    shards = {file: _checked(unpickled(file), file) for file in files.values()}
    for (tp_rank, pp_rank), file in files.items():
        check_place(shards[file].layout, tp_rank, pp_rank, files, folder)
    first = next(iter(shards.values()))
    model: dict[str, list[_Part]] = {}
    moments: dict[str, dict[str, list[_Part]]] = {}
    for file, shard in shards.items():
        # By repr, because a NaN among the values is not equal to itself.
        one_save = repr(shard.trainer) == repr(first.trainer)
        if not one_save or (shard.optimizer is None) != (first.optimizer is None):
            raise UserError(f"{file}: is of another checkpoint than its neighbours", COPY_ALL)
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


def _joined(name: str, parts: list[_Part]) -> torch.Tensor:
    """Return the whole tensor; ranks that hold the same part agree, so that any of them serves."""
    first = parts[0]
    whole, dim = first.split.global_shape, first.split.dim
    for part in parts:
        fits = (part.split.global_shape, part.split.dim) == (whole, dim)
        if not fits or part.tensor.dtype != first.tensor.dtype or tuple(part.tensor.shape) != part.split.local_shape:
            raise UserError(f"{part.file}: {name} {list(part.tensor.shape)} does not fit the other shards", COPY_ALL)
    if dim is None:
        return first.tensor
    covered, end = chain([(a, b, (part, a - at)) for part in parts for a, b, at in part.split.runs])
    if end != whole[dim]:
        folder = first.file.parent.parent
        raise UserError(f"{folder}: no shard holds {name} from entry {end} of {whole[dim]}", COPY_ALL)
    return torch.cat([p.tensor.narrow(dim, a - origin, b - a) for a, b, (p, origin) in covered], dim)


def _checked(payload: Any, file: Path) -> _Shard:
    """Return what `save_adapter` wrote, or UserError: the payload may be any value at all."""

    def tensors(value: Any) -> dict[str, torch.Tensor]:
        return {typed(name, str): typed(tensor, torch.Tensor) for name, tensor in typed(value, dict).items()}

    try:
        if typed(payload, dict)["format"] != FORMAT:
            raise ValueError(f"format {payload['format']!r}, but this version reads {FORMAT}")
        model, moments = tensors(payload["model"]), payload["optimizer"]
        shard = _Shard(
            layout=layout_from(payload["layout"]),
            model=model,
            splits={name: split_from(payload["splits"][name]) for name in model},
            optimizer=None if moments is None else {typed(n, str): tensors(v) for n, v in typed(moments, dict).items()},
            trainer=typed(payload["trainer"], (dict, type(None))),
        )
        if not set(shard.optimizer or ()) <= set(model):
            raise ValueError(f"optimizer state of {min(set(shard.optimizer or ()) - set(model))}, which is not there")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: is no adapter shard of megalora ({error!r})", "name a run or a checkpoint") from None
    return shard
