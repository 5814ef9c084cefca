"""The training run, top to bottom: what it starts from, the engine, the steps, the checkpoints.

    torchrun --nproc_per_node 4 tools/finetune.py --model_path DIR --data_path rows.json --output_dir out \\
        --tensor_parallel_size 2 --pipeline_parallel_size 2
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalora import __version__
from megalora.auto_layout import choose
from megalora.building import (
    Engine,
    EngineSettings,
    build_trainer,
    largest_exchange,
    load_adapter,
    load_base_weights,
    resolve_base,
)
from megalora.checkpoint.run.folder import claim, export_folder, remove_run, tokenizer_folder
from megalora.cluster.launch import choose_device, distributed, fix_order_of_sums, tp_crossing
from megalora.cluster.lock import RunLock
from megalora.cluster.preemption import Preemption
from megalora.cluster.ranklog import RankLog
from megalora.cluster.watch import Watch
from megalora.errors import UserError
from megalora.flags import FinetuneArguments
from megalora.flags.writing import run_yaml, settings_of
from megalora.model_paths import public_name
from megalora.models.stage import Stage
from megalora.monitor import Monitor, Timers
from megalora.monitor.console import Console
from megalora.monitor.meter import Meter
from megalora.monitor.metrics import METRICS
from megalora.ops.merged_attention import merges
from megalora.parallel.collectives import gather_objects, on_first, tell_once, tell_stage, together
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.peer_memory import choose_exchange
from megalora.parallel.placement import Placement
from megalora.planning.fitting import Budget, Fitting
from megalora.planning.free import free_memory
from megalora.planning.nodes import Workload
from megalora.profiling import Profiler
from megalora.rows import pixel_reader
from megalora.saving import RunSaver, restore
from megalora.starting import Beginning, begin
from megalora.stepping import Session
from megalora.summary import contexts, drawn_layout, flops_per_token, forecast, not_sequence_parallel, start_up_table
from megalora.training import steady_heap


@dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves; the same on every rank.

    steps            done in all, those of earlier starts included
    loss             of the last step of this start; None where nothing was left to do
    evaluation_loss  of the last evaluation of this start; None where none was made
    checkpoint       the folder of the last checkpoint; None where the run saved none (--save false)
    adapter          the PEFT folder; None where there is no checkpoint
    metrics          metrics.jsonl
    """

    output_dir: Path
    steps: int
    loss: float | None
    evaluation_loss: float | None
    checkpoint: Path | None
    adapter: Path | None
    metrics: Path


def finetune(arguments: FinetuneArguments) -> FinetuneResult:
    """Run `arguments` on this process of the mesh. Raises UserError, on every rank, for what the user can fix."""
    flags = run_yaml(arguments, str(Path.cwd()), __version__)
    device, remark = choose_device()
    arguments, chosen = choose(arguments, device)
    train = arguments.train
    tokens = train.per_device_train_batch_size * arguments.data.seq_length // arguments.parallel.context_parallel_size
    rows, data = train.per_device_train_batch_size, arguments.data
    parallel = arguments.parallel.for_tokens(math.gcd(tokens, rows * (data.source_length or 0)))
    arguments = replace(arguments, parallel=parallel)
    if train.deterministic:
        fix_order_of_sums(device)
    timers, profiler = Timers(train.wall_clock_breakdown, device), Profiler(device)
    clock = profiler.clock(timers) if train.profile else timers
    watch = Watch(clock, heartbeat_timeout=parallel.heartbeat_timeout, hang_timeout=train.hang_timeout)
    tp, pp, lock = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, RunLock(train.output_dir)
    with Preemption() as preemption, lock, distributed(device, tp, pp, watch, cp=parallel.context) as mesh:
        notes = [*([remark] if remark else []), *chosen]
        if tp > 1 and not parallel.sequence_parallel:
            notes.append(not_sequence_parallel(tokens, tp))
        beginning = begin(arguments, lock, mesh, device)
        notes += beginning.notes
        place, note = _placement(arguments, beginning, mesh, device)
        notes += [note] if note else []
        work = _workload(arguments, beginning, device)
        engine = _engine(arguments, beginning, place, work, mesh, watch, profiler)
        work = engine.cut.fit.work
        notes += engine.notes
        crossing = tp_crossing(mesh.world_size, tp, pp, watch.hosts, _reduced_megabytes(beginning, tokens))
        notes += [crossing] if crossing else []
        loaders = [beginning.loader, *beginning.evaluations.values()]
        notes += [note for loader in loaders for note in loader.rows.notes]
        table = start_up_table(arguments, beginning, engine, work, mesh)
        if train.dry_run:
            engine.trainer.close()
            notes.append(forecast(arguments, beginning, engine, work, mesh))
            return _told(arguments, beginning, table, notes, mesh)
        log, monitor, saver = _files(arguments, flags, beginning, engine, mesh, watch)
        preemption.steps()
        with log, monitor, saver, steady_heap(), contextlib.closing(engine.trainer), watch:
            monitor.summary(table)
            for note in notes:
                monitor.note(note)
            flops = flops_per_token(beginning.config, beginning.lora, beginning.loader.rows)
            meter = Meter(flops, mesh.world_size, beginning.loader.steps_per_epoch)
            parts = monitor, saver, meter, timers, watch, profiler, preemption
            session = Session(arguments, beginning, engine, work, mesh, *parts, table)
            session.run()
    return FinetuneResult(
        output_dir=Path(train.output_dir),
        steps=max(beginning.first_step, beginning.total_steps),
        loss=session.loss,
        evaluation_loss=session.evaluation_loss,
        checkpoint=session.saved,
        adapter=None if session.saved is None else export_folder(train.output_dir),
        metrics=Path(train.output_dir) / METRICS,
    )


def _told(
    arguments: FinetuneArguments,
    beginning: Beginning,
    table: dict[str, dict[str, Any]],
    notes: list[str],
    mesh: ParallelMesh,
) -> FinetuneResult:
    """Show what a run will be, which is not made (dry_run)."""
    if mesh.world.is_first:
        console = Console(beginning.total_steps, beginning.first_step)
        console.summary(table)
        for note in notes:
            console.note(note)
    folder = Path(arguments.train.output_dir)
    return FinetuneResult(folder, beginning.first_step, None, None, None, None, folder / METRICS)


# ---- the engine ----


def _placement(
    arguments: FinetuneArguments, beginning: Beginning, mesh: ParallelMesh, device: torch.device
) -> tuple[Placement, str | None]:
    """Return where the layers lie and how they communicate, and a note on the latter. Collective."""
    parallel, work = arguments.parallel, arguments.train.per_device_train_batch_size * arguments.data.seq_length
    work //= parallel.context_parallel_size
    if beginning.config.encoder is not None:
        work = max(work, arguments.train.per_device_train_batch_size * arguments.data.source_tokens)
    dtype = beginning.compute.dtype
    with together(mesh.world):
        exchange, note = choose_exchange(
            parallel.tp_comm_overlap,
            mesh,
            parallel.sequence_parallel,
            device,
            largest_exchange(beginning.config, beginning.lora, mesh.tp.size, work, dtype, device),
        )
    base = resolve_base(arguments.model.base_format, beginning.config)
    return Placement(mesh.tp, parallel.sequence_parallel, dtype, device, exchange, base, mesh.cp), note


def _workload(arguments: FinetuneArguments, beginning: Beginning, device: torch.device) -> Workload:
    """Return a mean microbatch of the run, from which the stages' costs are estimated."""
    rows = beginning.loader.rows
    seen = contexts(rows)
    return Workload(
        arguments.train.per_device_train_batch_size,
        rows.seq_length,
        context=seen.of_targets,
        labelled=rows.labelled_tokens / (rows.tokens - seen.sources),
        element=beginning.compute.dtype.itemsize,
        sequence_parallel=arguments.parallel.sequence_parallel,
        base_format=beginning.base_format,
        context_parallel=arguments.parallel.context_parallel_size,
        source_context=seen.of_sources,
        memory_context=seen.of_memory,
        source_length=0 if rows.sides is None else rows.sides.source_length,
        merges=merges(device),
    )


def _engine(
    arguments: FinetuneArguments,
    beginning: Beginning,
    place: Placement,
    work: Workload,
    mesh: ParallelMesh,
    watch: Watch,
    profiler: Profiler,
) -> Engine:
    """Build the trainer, with the adapter, moments and numbers that the run starts from. Collective."""
    train, parallel, start = arguments.train, arguments.parallel, beginning.start
    notes: list[str] = []

    def fill(stage: Stage) -> None:
        stage.reset_head(train.seed)
        notes.extend(load_base_weights(stage, beginning.weights))
        stage.read_pictures(pixel_reader(beginning.config, arguments.model.model_path))
        if start is None:
            stage.reset_adapters(train.seed)
        else:
            load_adapter(stage, start.checkpoint.tensors, start.checkpoint.where)

    settings = EngineSettings(
        work,
        learning_rate=lambda step: train.learning_rate_at(step, beginning.total_steps),
        partition_method=parallel.partition_method,
        custom_partition=parallel.custom_partition,
        uneven_heads=parallel.uneven_heads,
        profile_file=parallel.profile_file,
        schedule=parallel.schedule,
        chunks=parallel.virtual_pipeline_size,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        optimizer={
            "kind": train.optimizer,
            "betas": (train.adam_beta1, train.adam_beta2),
            "eps": train.adam_epsilon,
            "weight_decay": train.weight_decay,
            "loraplus_lr_ratio": train.loraplus_lr_ratio,
        },
        cuda_graphs=train.cuda_graphs,
        fitting=_fitting(arguments, mesh, torch.device(place.device)),
        timed=train.wall_clock_breakdown or train.profile,
    )
    tell_stage(f"loading the base weights of {beginning.weights}", mesh.world)
    engine = build_trainer(
        beginning.config, mesh, beginning.lora, place, settings, fill, clock=watch, watch=profiler.watch
    )
    notes += [engine.cut.fit.note] if engine.cut.fit is not None and engine.cut.fit.note else []
    tell_once(notes, mesh.world)
    with together(mesh.world):
        if beginning.first_step:
            restore(engine.trainer, start.checkpoint, engine.splits)
    return engine


def _fitting(arguments: FinetuneArguments, mesh: ParallelMesh, device: torch.device) -> Fitting:
    """Return how it is chosen what to recompute. Collective. Raises UserError for offloading on a CPU."""
    parallel, budget = arguments.parallel, None
    if device.type == "cuda":
        mine = free_memory(device, None if parallel.memory is None else int(parallel.memory * 2**30))
        all_of_them = gather_objects((mine.device, mine.host), mesh.world)
        budget = Budget(*(min(sizes) for sizes in zip(*all_of_them, strict=True)))
    elif parallel.offload_activations or parallel.memory is not None:
        name = "offload_activations true" if parallel.offload_activations else f"memory {parallel.memory:g}"
        raise UserError(f"{name} has no effect on a CPU", "leave it out, or run on GPUs")
    return Fitting(
        parallel.recompute,
        budget,
        parallel.recompute_layers,
        parallel.offload_activations,
        arguments.train.gradient_accumulation_steps,
    )


def _reduced_megabytes(beginning: Beginning, tokens: int) -> float:
    """Return what tensor parallelism reduces in one layer and microbatch: twice in forward, twice in backward."""
    return 4 * tokens * beginning.config.hidden_size * beginning.compute.dtype.itemsize / 1e6


# ---- what the run writes ----


def _files(
    arguments: FinetuneArguments,
    flags: str,
    beginning: Beginning,
    engine: Engine,
    mesh: ParallelMesh,
    watch: Watch,
) -> tuple[RankLog, Monitor, RunSaver]:
    """Open what the run writes, once nothing of it can be refused any more; an old run makes way. Collective."""
    train = arguments.train
    with together(mesh.world):
        log = RankLog(train.log_dir or Path(train.output_dir) / "logs", mesh.rank, watch.hosts[mesh.rank])
        watch.tell(log.write, log.say, log.file)
    layout = drawn_layout(arguments.parallel.schedule, engine.cut, mesh)
    note = on_first(lambda: claim(train.output_dir, flags, layout), mesh.world)
    if beginning.overwrite:
        on_first(lambda: remove_run(train.output_dir), mesh.world)
    if train.save:
        on_first(lambda: beginning.template.write(tokenizer_folder(train.output_dir)), mesh.world)
    with together(mesh.world):
        monitor = Monitor(
            train.output_dir,
            mesh.rank,
            beginning.total_steps,
            beginning.first_step,
            log.write,
            train.report_to,
            settings_of(arguments),
        )
    saver = RunSaver(
        train.output_dir,
        train.save_total_limit,
        mesh=mesh,
        parameters=engine.parameters,
        splits=engine.splits,
        lora_config=beginning.lora.config.to_dict()
        | {"base_model_name_or_path": public_name(arguments.model.model_path)},
        trainer=engine.trainer,
        identity=beginning.identity,
        first=monitor.sync,
        enabled=train.save,
    )
    if note:
        monitor.note(note)
    return log, monitor, saver
