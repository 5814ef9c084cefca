"""Chooses the layout of a run where its flags leave it open: the planner's fastest that fits."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_base, resolve_lora
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import CONFIG_FILE
from megalora.checkpoint.run.state import newest_file
from megalora.cluster.environment import environment_int
from megalora.compute_dtype import local_dtype
from megalora.errors import UserError
from megalora.files import read_json
from megalora.flags import FinetuneArguments
from megalora.flags.writing import changed
from megalora.models.config import read_config
from megalora.models.spec import ModelSpec
from megalora.ops.merged_attention import merges
from megalora.plan import layout_flags, nothing_fits, sizes_of, slowness
from megalora.planning.devices import device_of
from megalora.planning.layouts import Planner
from megalora.planning.nodes import Workload
from megalora.planning.plans import Cluster, Plan, Wanted
from megalora.profiling import read_profile

_GIB = 2**30
_RESERVE = {"cuda": 4 * _GIB, "cpu": _GIB}  # what is left free on each device, or for each process on a CPU
_SHAPING = (
    *("tensor_parallel_size", "pipeline_parallel_size", "sequence_parallel", "schedule", "virtual_pipeline_size"),
    *("context_parallel_size", "recompute", "partition_method", "custom_partition", "uneven_heads"),
)
"""Flags of the layout. Giving one of them is choosing it oneself, unless --layout auto is given too."""


def choose(arguments: FinetuneArguments, device: torch.device) -> tuple[FinetuneArguments, tuple[str, ...]]:
    """Return the arguments with nothing of the layout left open, and notes that say what was chosen and why.

    Every rank comes to the same, without a message: nothing here depends on the rank, on hosts of one kind of device.
    Raises UserError where nothing fits, or global_batch_size cannot be dealt to the ranks.
    """
    world_size = environment_int("WORLD_SIZE", 1)
    fixed = arguments.train.max_tokens_per_microbatch is not None
    arguments = replace(arguments, train=arguments.train.in_rows(arguments.data.seq_length))
    if not _is_open(arguments, device, world_size):
        return _dealt(arguments, world_size), ()
    best, cluster, count = _best(arguments, device, world_size, fixed)
    layout, work = best.layout, best.layout.work
    parallel = replace(
        arguments.parallel,
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=work.sequence_parallel if layout.tp > 1 else None,
        schedule=layout.schedule,
        virtual_pipeline_size=layout.chunks,
        recompute=layout.recompute,
    )
    train = replace(
        arguments.train,
        per_device_train_batch_size=work.rows,
        gradient_accumulation_steps=layout.microbatches,
        global_batch_size=None,
    )
    note = (
        f"layout auto: {sizes_of(layout)}, the fastest of {count} sizes that "
        f"fit by the plan: {best.seconds:.3g} s a step, {best.memory / _GIB:.1f} of {cluster.usable / _GIB:.1f} GiB; "
        f"to fix it: {layout_flags(best, arguments.parallel)}"
    )
    return replace(arguments, parallel=parallel, train=train), (note,)


def _is_open(arguments: FinetuneArguments, device: torch.device, world_size: int) -> bool:
    if arguments.parallel.layout is not None:
        return arguments.parallel.layout == "auto"
    given = dict(changed(arguments.parallel))
    return device.type == "cuda" and world_size > 1 and not any(name in given for name in _SHAPING)


def _dealt(arguments: FinetuneArguments, world_size: int) -> FinetuneArguments:
    """Return the arguments with the microbatches of global_batch_size, where that is given."""
    train, parallel = arguments.train, arguments.parallel
    if train.global_batch_size is None:
        return arguments
    model = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.context_parallel_size
    each = max(1, world_size // model) * train.per_device_train_batch_size
    if train.global_batch_size % each:
        raise UserError(
            f"global_batch_size ({train.global_batch_size}) is not a multiple of the {each} rows of one microbatch on "
            f"all {max(1, world_size // model)} data-parallel ranks (per_device_train_batch_size "
            f"{train.per_device_train_batch_size})",
            f"choose {train.global_batch_size // each * each or each}, or another per_device_train_batch_size",
        )
    steps = train.global_batch_size // each
    return replace(arguments, train=replace(train, gradient_accumulation_steps=steps, global_batch_size=None))


def _best(
    arguments: FinetuneArguments, device: torch.device, world_size: int, fixed: bool
) -> tuple[Plan, Cluster, int]:
    """Return the fastest plan, the cluster it is for, and of how many sizes it is the fastest.

    fixed  whether a microbatch has the rows that the arguments say
    """
    model, parallel, train = arguments.model, arguments.parallel, arguments.train
    config = read_config(model.model_path)
    lora = resolve_lora(_lora_config(arguments, config), config)
    base_format = resolve_base(model.base_format, config).name
    cluster = _cluster(arguments, device, world_size)
    if parallel.profile_file is not None:
        measured = read_profile(parallel.profile_file, config, base_format)
        factor = slowness(measured, config, lora, cluster.device, device.type)
        cluster = replace(cluster, device=cluster.device.scaled(factor))
    given = dict(changed(parallel))
    rows = train.global_batch_size
    if rows is None:  # as data parallelism alone would have it: the layout changes no number
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size
    work = Workload(
        1,
        arguments.data.seq_length,
        element=local_dtype(model.dtype, device).itemsize,
        base_format=base_format,
        source_length=0 if config.encoder is None else arguments.data.source_tokens,
        merges=merges(device) and not train.deterministic,
    )
    wanted = Wanted(
        work,
        rows,
        rows=train.per_device_train_batch_size if fixed else None,
        tp=given.get("tensor_parallel_size"),
        pp=given.get("pipeline_parallel_size"),
        cp=given.get("context_parallel_size"),
        sequence_parallel=given.get("sequence_parallel"),
        schedule=given.get("schedule"),
        chunks=given.get("virtual_pipeline_size"),
        recompute=given.get("recompute"),
        partition_method=parallel.partition_method,
        custom_partition=parallel.custom_partition,
        uneven_heads=parallel.uneven_heads,
        recompute_layers=parallel.recompute_layers,
        offloads=parallel.offload_activations,
    )
    plans, too_large = Planner(config, lora, cluster, device.type).search(wanted)
    if not plans:
        raise nothing_fits(too_large[0], cluster, cluster.usable / _GIB)
    return plans[0], cluster, len(plans)


def _lora_config(arguments: FinetuneArguments, config: ModelSpec) -> LoraConfig:
    """Return the one that the run will have (see megalora.starting): of the flag, else of the checkpoint or the adapter
    that it goes on from, else the default."""
    model, train = arguments.model, arguments.train
    if model.lora_config is not None:
        return LoraConfig.from_json(model.lora_config)
    file = None if train.overwrite_output_dir else newest_file(train.output_dir, CONFIG_FILE)
    if file is not None:
        return LoraConfig.from_dict(read_json(file), str(file), trained=True)
    if model.resume_peft_from_checkpoint is not None:
        adapter = open_adapter(model.resume_peft_from_checkpoint)
        return LoraConfig.from_dict(adapter.lora_config, adapter.where, trained=True)
    return LoraConfig(task_type=config.tasks[0])


def _cluster(arguments: FinetuneArguments, device: torch.device, world_size: int) -> Cluster:
    """Return the processes of the run with what each may take, --memory at most. Of the host's memory, whose free part
    differs from host to host, each has a share of half of all, where the run is told to offload."""
    local, most = environment_int("LOCAL_WORLD_SIZE", world_size), arguments.parallel.memory
    usable = _memory(device, local) - _RESERVE[device.type]
    if most is not None:
        usable = min(usable, int(most * _GIB))
    host = _host_memory() // 2 // local if arguments.parallel.offload_activations else 0
    return Cluster(world_size, local, usable, device_of(device), host)


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory(device: torch.device, processes: int) -> int:
    """Return the bytes of a GPU, or of each process's share of a host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _host_memory() // processes
