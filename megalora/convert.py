"""Conversions, top to bottom: what is read, what will be written, the checks, the writing.

    python tools/convert_hf.py to-shards --input HF_FOLDER --output SHARDS --tensor_parallel_size 2
    python tools/convert_hf.py to-hf --input SHARDS --output HF_FOLDER

In one process, on the CPU; base weights pass through in blocks, so that memory does not grow with the model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megalora.arguments import Conversion, ConvertArguments, LayoutArguments
from megalora.building import stage_layers
from megalora.checkpoint.hf import is_hf
from megalora.checkpoint.shards import Layout, has_shards
from megalora.checkpoint.streams import TensorType
from megalora.checkpoint.target import TargetFolder, companions
from megalora.checkpoint.transfer import Plan, plan_hf, plan_shards, tensor_types, transfer
from megalora.checkpoint.weights import BaseWeights, open_base
from megalora.errors import UserError
from megalora.lora import layer_index
from megalora.models.config import ModelConfig, check_layout, read_config
from megalora.models.stage import Stage, expected_weights
from megalora.monitor.progress import ByteProgress
from megalora.parallel.linear import Placement
from megalora.parallel.mesh import Axis
from megalora.parallel.split import Split, named_splits


def convert(arguments: Conversion) -> None:
    """Runs one conversion. Raises UserError for what the user can mend; what was at the output is then untouched."""
    _COMMANDS[arguments.command](arguments)


# ---- base weights ----


def _to_shards(arguments: Conversion) -> None:
    target = _target(arguments.paths)
    config, weights = _read_base(arguments.paths.input)
    tensors = tensor_types(weights, expected_weights(config))
    plan = plan_shards(tensors, _places(config, arguments.layout, tensors))
    _write_base(arguments, target, weights, plan, arguments.paths.input)


def _to_hf(arguments: Conversion) -> None:
    target = _target(arguments.paths)
    config, weights = _read_base(arguments.paths.input)
    plan = plan_hf(tensor_types(weights, expected_weights(config)), _max_file_bytes(arguments))
    _write_base(arguments, target, weights, plan, arguments.paths.input)


def _reshard(arguments: Conversion) -> None:
    folder = Path(arguments.paths.input)
    if is_hf(folder) or not has_shards(folder):
        raise UserError(f"input {folder}: is no folder of shards, which reshard reads: for safetensors use to-shards")
    _to_shards(arguments)


def _read_base(folder: str) -> tuple[ModelConfig, BaseWeights]:
    """The model in a folder of safetensors or shards, checked to be whole."""
    config = read_config(folder)
    return config, open_base(folder, expected_weights(config), config.tie_word_embeddings)


def _max_file_bytes(arguments: Conversion) -> int:
    return int(arguments.safetensors.max_shard_size * 1e9)


def _write_base(arguments: Conversion, target: TargetFolder, weights: BaseWeights, plan: Plan, model: str) -> None:
    """Weights as planned, and what lies beside them in the folder of the model."""
    beside = companions(model)
    nbytes = plan.nbytes + sum(file.stat().st_size for file in beside.values())
    target.check_room(nbytes)
    if arguments.paths.dry_run:
        _say_plan(arguments, target, plan, beside, nbytes)
        return
    began = time.monotonic()
    with target.writing() as folder:
        with ByteProgress(sum(file.nbytes for file in plan.files), arguments.command) as progress:
            transfer(weights, plan, folder, progress.advance)
        for name, file in beside.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    files = len(plan.files) + len(plan.texts) + len(beside)
    _say_done(arguments, f"{files} files, {nbytes / 1e9:.2f} GB, {time.monotonic() - began:.1f} s")


# ---- layouts ----


def _places(
    config: ModelConfig, layout: LayoutArguments, tensors: Mapping[str, TensorType]
) -> dict[Layout, dict[str, Split]]:
    """What of each tensor lies on each rank. Raises UserError where the model cannot be cut so."""
    tp, pp = layout.tensor_parallel_size, layout.pipeline_parallel_size
    check_layout(config, tp, pp, layout.uneven_heads)
    layers = stage_layers(config, pp, layout.partition_method, layout.custom_partition)
    places = {}
    for at in (Layout(tp, pp, tp_rank, pp_rank) for pp_rank in range(pp) for tp_rank in range(tp)):
        place = Placement(Axis(at.tp_rank, tuple(range(tp))), False, torch.float32, "meta")
        here = layers[at.pp_rank]
        splits = named_splits(Stage(config, here, place, first=at.pp_rank == 0, last=at.pp_rank == pp - 1))
        # Old files hold rotary frequencies, which are no parameters, beside the weights of a layer.
        frequencies = {n: Split(t.shape) for n, t in tensors.items() if n.endswith("inv_freq")}
        splits |= {name: split for name, split in frequencies.items() if (layer_index(name) or 0) in here}
        places[at] = splits
    return places


# ---- what is checked and said ----


def _target(paths: ConvertArguments, *more: str) -> TargetFolder:
    return TargetFolder(paths.output, paths.overwrite, [paths.input, *more])


def _say_plan(
    arguments: Conversion, target: TargetFolder, plan: Plan, beside: Mapping[str, Path], nbytes: int
) -> None:
    width = max(len(file.path) for file in plan.files)
    print(f"{arguments.command}: {arguments.paths.input} -> {arguments.paths.output}, which would hold")
    for file in plan.files:
        print(f"  {file.path:{width}}  {len(file.table):5} tensors  {file.nbytes / 1e9:9.3f} GB")
    print(f"  and {', '.join(dict.fromkeys(Path(name).name for name in (*plan.texts, *beside)))}")
    files = len(plan.files) + len(plan.texts) + len(beside)
    print(
        f"{len(plan.tensors)} tensors, {files} files, {nbytes / 1e9:.3f} GB "
        f"({target.free_bytes / 1e9:.1f} GB are free); nothing was written"
    )


def _say_done(arguments: Conversion, what: str) -> None:
    print(f"{arguments.command}: {arguments.paths.output} is written ({what})", flush=True)


_COMMANDS = {"to-shards": _to_shards, "to-hf": _to_hf, "reshard": _reshard}
