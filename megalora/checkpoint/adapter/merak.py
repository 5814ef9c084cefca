"""Adapters that Merak wrote, the system whose launch commands megalora keeps.

    lora_model_optim.pt                                   without tensor and pipeline parallelism
    mp_rank_XX/lora_partial_model_optim.pt                without pipeline parallelism
    mp_rank_XX_pp_rank_YYY/lora_partial_model_optim.pt    else

with a lora_config.json beside each. A file is a flat dict of tensors; its keys begin with the number of the piece of
the model that the tensor is of, and name the adapter: `2.model.layers.1.self_attn.q_proj.lora_A.default.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megalora.checkpoint.adapter.shards import CONFIG_FILE, AdapterCheckpoint
from megalora.checkpoint.disk import unpickled
from megalora.checkpoint.layout import ADAPTER_FILE, has_shards, shard_files
from megalora.checkpoint.manifest import MANIFEST
from megalora.checkpoint.run.folder import TRACKER
from megalora.errors import UserError
from megalora.files import read_bytes, read_json

SINGLE_FILE = "lora_model_optim.pt"
_TENSOR_RANK = re.compile(r"mp_rank_(\d{2,})")
_FACTOR = re.compile(r"(?:\d+\.)?(?P<linear>.+)\.(?P<factor>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_BIAS = re.compile(r"(?:\d+\.)?(?P<name>.+\.bias)")
# Fields that Merak writes and does not act on (finetuning/lora/utils.py, _find_and_replace): every adapted linear has
# the one rank and alpha, whatever they say.
_NOT_APPLIED: Mapping[str, Any] = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layers_pattern": None,
}


def reference_folder(path: Path) -> Path | None:
    """Return the folder of the files: `path`, or its newest iteration as the tracker says; None where it is not
    Merak's.
    """
    if _files(path):
        return path
    try:
        iteration = read_bytes(path / TRACKER, most=1 << 10).decode().strip()
    except (OSError, ValueError):
        return None
    folder = path / (f"iter_{int(iteration):07d}" if re.fullmatch(r"\d{1,12}", iteration) else "release")
    if (folder / MANIFEST).exists():  # one of ours, of which the tracker's need not be the newest sound one
        return None
    return folder if _files(folder) else None


def read_reference(folder: Path) -> AdapterCheckpoint:
    """Return the whole adapter in a folder for which `reference_folder` gives itself. Raises UserError."""
    files = _files(folder)
    config = read_json(next(iter(files.values())).with_name(CONFIG_FILE))
    stages: dict[int, list[dict[str, torch.Tensor]]] = {}
    for (_, pp_rank), file in sorted(files.items()):
        stages.setdefault(pp_rank, []).append(_by_our_names(_flat_dict(file), file))
    tensors: dict[str, torch.Tensor] = {}
    for ranks in stages.values():
        whole = _over_tensor_ranks(ranks, folder)
        if again := sorted(tensors.keys() & whole.keys()):
            raise UserError(f"{folder}: two stages hold {again[0]}", "copy all files of one checkpoint")
        tensors |= whole
    return AdapterCheckpoint({**config, **_NOT_APPLIED}, tensors, where=str(folder))


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """Return the files by (tp rank, pp rank); none where the folder is not Merak's. Raises UserError where one is
    missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return {(0, 0): folder / SINGLE_FILE}
    if not folder.is_dir():
        return {}
    matches = [match for child in folder.iterdir() if (match := _TENSOR_RANK.fullmatch(child.name))]
    if matches:
        found = {(int(match[1]), 0): folder / match[0] / ADAPTER_FILE for match in matches}
        for rank in range(1 + max(rank for rank, _ in found)):
            file = found.setdefault((rank, 0), folder / f"mp_rank_{rank:02d}" / ADAPTER_FILE)
            if not file.is_file():
                raise UserError(f"{folder}: {file.relative_to(folder)} is missing", "copy all of the checkpoint")
        return found
    if not has_shards(folder) or not any(folder.glob(f"mp_rank_*/{ADAPTER_FILE}")):
        return {}
    found = shard_files(folder, ADAPTER_FILE)
    try:
        return found if _is_flat(unpickled(found[0, 0])) else {}
    except UserError:  # if it is ours and damaged, its own reader knows better what to say and what to do
        return {}


def _is_flat(value: Any) -> bool:
    """Return whether it is a dict of tensors, as ours is not."""
    return isinstance(value, dict) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _flat_dict(file: Path) -> Mapping[str, torch.Tensor]:
    value = unpickled(file)
    if not _is_flat(value) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{file}: is not a flat dict of tensors by name, as its neighbours are", "copy the file again")
    return value


def _by_our_names(state: Mapping[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if found := _FACTOR.fullmatch(key):
            name = f"{found['linear']}.{found['factor']}.weight"
        elif found := _BIAS.fullmatch(key):
            name = found["name"]
        else:
            raise UserError(f"{file}: {key} is no lora_A, lora_B or bias of a linear", "use an adapter of linears only")
        if name in tensors:
            raise UserError(f"{file}: holds {name} of two adapters, {key} among them", "save the one that is meant")
        tensors[name] = tensor
    return tensors


def _over_tensor_ranks(ranks: list[dict[str, torch.Tensor]], folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of one stage: one that is not the same on all tp ranks is cut, lora_A along in, others
    along out.
    """
    first = ranks[0]
    for other in ranks[1:]:
        if other.keys() != first.keys():
            name = min(other.keys() ^ first.keys())
            raise UserError(f"{folder}: {name} is not on all tensor-parallel ranks", "copy all files of one checkpoint")
    whole = {}
    for name, tensor in first.items():
        parts = [rank[name] for rank in ranks]
        if all(torch.equal(tensor, part) for part in parts):
            whole[name] = tensor
            continue
        dim = 1 if name.endswith(".lora_A.weight") else 0
        try:
            whole[name] = torch.cat(parts, dim)
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{folder}: the parts of {name} do not fit ({error})", "copy all files of one checkpoint"
            ) from None
    return whole
