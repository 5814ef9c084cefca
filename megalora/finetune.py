"""The training run, top to bottom: model, adapter, data, steps, checkpoints.

    torchrun --nproc_per_node 4 tools/finetune.py --model_path DIR --data_path rows.json --output_dir out \
        --tensor_parallel_size 2 --pipeline_parallel_size 2
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalora.arguments import DataArguments, FinetuneArguments, ModelArguments, ParallelArguments, TrainArguments
from megalora.building import (
    Cut,
    build_stage,
    check_vocabulary,
    largest_exchange,
    load_adapter,
    load_base_weights,
    resolve_dtype,
    resolve_lora,
    trained_shapes,
)
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.peft import write_peft
from megalora.checkpoint.base.shards import AdapterCheckpoint, read_adapter
from megalora.checkpoint.run.state import (
    announce_removal,
    cancel_removal,
    export_folder,
    identity_difference,
    in_run,
    newest_sound,
    removal_is_pending,
    remove_export,
    remove_run,
    tokenizer_folder,
)
from megalora.cluster.launch import choose_device, distributed, fix_order_of_sums, restarts, tp_crossing
from megalora.cluster.lock import RunLock
from megalora.cluster.preemption import Preemption
from megalora.cluster.ranklog import RankLog
from megalora.cluster.watch import Watch
from megalora.data import (
    ChatTemplate,
    Loader,
    PackedRows,
    load_dataset,
    load_split,
    steps_ahead,
)
from megalora.errors import Preempted, UserError
from megalora.identity import base_identity, check_base, other_template, progress, run_identity
from megalora.lora import LoraConfig, ResolvedLora
from megalora.models.config import ModelConfig, check_layout, read_config
from megalora.models.graphs import choose_graphs
from megalora.models.stage import Stage, expected_weights, whole_on_meta
from megalora.monitor import Monitor, Timers, causal_context, lora_flops_per_token
from megalora.ops import extension
from megalora.optimizer import AdapterOptimizer, LossScale, learning_rate_factor
from megalora.parallel.collectives import gather_objects, on_first, together
from megalora.parallel.grads import FlatGradients
from megalora.parallel.linear import Placement
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.peer_memory import choose_exchange
from megalora.parallel.split import named_splits
from megalora.pipeline.p2p import Neighbours
from megalora.pipeline.runner import PipelineRunner
from megalora.pipeline.schedule import SCHEDULES
from megalora.planning.devices import device_of
from megalora.planning.layouts import Layout, predicted
from megalora.planning.nodes import Workload
from megalora.profiling import Profiler, model_words, recorded_steps, write_profile
from megalora.rows import data_settings, template_options
from megalora.saving import RunSaver, restore
from megalora.training import StepResult, Trainer, steady_heap


def finetune(arguments: FinetuneArguments) -> None:
    """Runs `arguments` on this process of the mesh. Raises UserError, on every rank, for what the user can mend."""
    model, data, train = arguments.model, arguments.data, arguments.train
    tokens_here = train.per_device_train_batch_size * data.seq_length  # of a microbatch
    parallel = arguments.parallel.for_tokens(tokens_here)
    arguments = replace(arguments, parallel=parallel)
    device, remark = choose_device()
    if train.deterministic:
        fix_order_of_sums(device)
    timers = Timers(train.wall_clock_breakdown, device)
    profiler = Profiler(device)
    clock = profiler.clock(timers) if train.profile else timers
    watch = Watch(clock, heartbeat_timeout=parallel.heartbeat_timeout, hang_timeout=train.hang_timeout)
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    lock = RunLock(train.output_dir)
    with Preemption() as preemption, lock, distributed(device, tp, pp, watch) as mesh:
        dtype = resolve_dtype(model.dtype, device)
        notes = [remark] if remark else []
        if tp > 1 and not parallel.sequence_parallel:
            notes.append(_not_sequence_parallel(tokens_here, tp))

        # What is trained: the model's shape, the adapter to start from, the rows.
        with together(mesh.world):
            config = read_config(model.model_path)
            check_layout(config, mesh.tp.size, mesh.pp.size, parallel.uneven_heads)
            _check_length(config, data, train, parallel.sequence_parallel, mesh)
        not_locked = _keep_others_out(lock, mesh)
        notes += [not_locked] if not_locked else []
        overwrite = _overwrites(model, train, mesh)
        start = _find_start(model, train, overwrite, mesh)
        with together(mesh.world):
            lora = resolve_lora(_lora_config(model, start), config)
            _check_same_adapter(lora, start, config)
            template = ChatTemplate.load(model.model_path, data.template, template_options(data))
            notes += template.notes
            rows, eval_rows = _load_rows(template, data, train)
            for loaded in (rows, eval_rows):
                if loaded is not None:
                    check_vocabulary(loaded.max_token_id, config, model.model_path)
        loader = _loader(rows, train, mesh)
        weights = model.resume_from_checkpoint or model.model_path
        base = on_first(lambda: base_identity(config, weights, template.tokenizer), mesh.world)
        identity = run_identity(base, lora.config, template, rows, loader.global_batch_rows, train.seed)
        with together(mesh.world):
            first_step, start_note = _first_step(start, identity)
            total_steps = train.total_steps(loader.steps_per_epoch)
            if start is not None:
                notes += [*start.checkpoint.notes, start_note, *other_template(start.checkpoint, template)]
                if start.own and model.resume_peft_from_checkpoint is not None:
                    named = model.resume_peft_from_checkpoint
                    notes.append(f"resume_peft_from_checkpoint {named} is not read: the run in output_dir goes on")
            settings = _settings(train, dtype, total_steps)
            if first_step:
                notes += _changed(start.checkpoint, settings)

        # This rank's part of it.
        with together(mesh.world):
            exchange, exchange_note = choose_exchange(
                parallel.tp_comm_overlap,
                mesh,
                parallel.sequence_parallel,
                device,
                largest_exchange(config, lora, tp, tokens_here, dtype, device),
            )
            notes += [exchange_note] if exchange_note else []
            place = Placement(mesh.tp, parallel.sequence_parallel, dtype, device, exchange)
            work = _workload(rows, train, parallel, dtype)
            stage, cut = build_stage(
                config,
                mesh,
                lora,
                place,
                partition_method=parallel.partition_method,
                custom_partition=parallel.custom_partition,
                virtual_pipeline_size=parallel.virtual_pipeline_size,
                uneven_heads=parallel.uneven_heads,
                recompute=parallel.recompute,
                workload=work,
                profile_file=parallel.profile_file,
            )
        with together(mesh.world):
            load_base_weights(stage, weights)
            if start is None:
                stage.reset_adapters(train.seed)
            else:
                load_adapter(stage, start.checkpoint.tensors, start.checkpoint.where)
        with together(mesh.world):
            timed = train.wall_clock_breakdown or train.profile
            graphs, graphs_note = choose_graphs(train.cuda_graphs, place, mesh, config.head_dim, timed=timed)
            notes += [graphs_note] if graphs_note else []
        if graphs:
            stage.use_graphs()
        parameters, splits = stage.trainable(), named_splits(stage)
        crossing = tp_crossing(mesh.world_size, tp, pp, watch.hosts, _reduced_megabytes(config, data, train, dtype))
        notes += [crossing] if crossing else []
        tokens_here //= mesh.tp.size if parallel.sequence_parallel else 1
        chunks = parallel.virtual_pipeline_size
        runner = PipelineRunner(
            stage,
            Neighbours(mesh, (tokens_here, config.hidden_size), dtype, device, ring=chunks > 1),
            SCHEDULES[parallel.schedule],
            cut.floor,
            device=device,
            chunks=chunks,
            clock=watch,
            watch=profiler.watch,
        )
        with together(mesh.world):
            optimizer = AdapterOptimizer(
                parameters,
                kind=train.optimizer,
                betas=(train.adam_beta1, train.adam_beta2),
                eps=train.adam_epsilon,
                weight_decay=train.weight_decay,
            )
        trainer = Trainer(
            stage,
            mesh,
            runner,
            FlatGradients(parameters, splits, mesh, device),
            optimizer,
            learning_rate=lambda step: (
                train.learning_rate
                * learning_rate_factor(train.lr_scheduler_type, step, total_steps, train.warmup_steps)
            ),
            max_grad_norm=train.max_grad_norm,
            seed=train.seed,
            loss_scale=LossScale(dtype == torch.float16),
            clock=watch,
        )
        with together(mesh.world):
            if first_step:
                restore(trainer, start.checkpoint, splits)
        if overwrite:  # now that nothing of the new run can be refused any more
            on_first(lambda: remove_run(train.output_dir), mesh.world)
        with together(mesh.world):
            log = RankLog(train.log_dir or Path(train.output_dir) / "logs", mesh.rank, watch.hosts[mesh.rank])
            watch.tell(log.write, log.say, log.file)
            monitor = Monitor(train.output_dir, mesh.rank, total_steps, first_step, log.write)
        saver = RunSaver(
            train.output_dir,
            train.save_total_limit,
            mesh=mesh,
            parameters=parameters,
            splits=splits,
            lora_config=lora.config.to_dict() | {"base_model_name_or_path": model.model_path},
            trainer=trainer,
            identity=identity,
            first=monitor.sync,
            enabled=train.save,
        )

        # The steps.
        preemption.steps()
        with log, monitor, saver, steady_heap(), contextlib.closing(trainer), watch:
            summary = _summary(arguments, config, lora, stage, cut, rows, loader, mesh, device, dtype)
            summary["data"]["template"] = f"{template.description} ({template.identity()})"
            monitor.summary(summary)
            if train.save:
                on_first(lambda: _leave_tokenizer(template, tokenizer_folder(train.output_dir)), mesh.world)
            of_rows = [note for loaded in (rows, eval_rows) if loaded is not None for note in loaded.notes]
            for note in [*notes, *of_rows]:
                monitor.note(note)
            meter = _Meter(_flops_per_token(config, lora, rows), mesh.world_size)
            saved = None
            if first_step:
                meter.go_on(start.checkpoint.trainer)
            batches = steps_ahead(loader.step, first_step, total_steps)
            if start is not None and start.own and eval_rows is not None:
                last = on_first(lambda: monitor.last_evaluation, mesh.world)
                if last < first_step and (_every(train.eval_steps, first_step) or first_step >= total_steps):
                    _evaluate(trainer, eval_rows, first_step, monitor, train, mesh)  # stopped before it was made
            if first_step < total_steps:  # an adapter of fewer steps would pass for this run's
                on_first(lambda: remove_export(train.output_dir), mesh.world)
            profiled = recorded_steps(train.profile_steps if train.profile else 0, first_step, total_steps, graphs)
            for number in range(first_step, total_steps):
                watch.step(number)
                with profiler.step(number in profiled, mesh.world):
                    with watch("data"):
                        batch = next(batches)
                    result = trainer.step(number, batch, alarm=saver.failed or monitor.failed or preemption.asked)
                step = number + 1
                if result.alarm:
                    _raise_what_failed(saver, monitor, mesh)
                meter.count(result.tokens)
                if result.skipped:
                    monitor.note(f"step {step} skipped: {result.skipped}")
                if profiled and number == profiled[-1]:
                    with meter.apart(timers):
                        monitor.note(_write_profile(profiler, arguments, config, lora, stage, cut, work, mesh, device))
                if step % train.logging_steps == 0 or step == total_steps:
                    monitor.step(meter.record(step, result, timers))
                else:
                    monitor.progress(step)
                leaving = result.alarm and step < total_steps  # nothing has failed, so a signal asks for it
                if train.save and (leaving or _every(train.save_steps, step) or step == total_steps):
                    with watch("checkpoint"):
                        saved = saver.save(
                            step, meter.state() | {"settings": settings, "chat_template": template.source}
                        )
                if eval_rows is not None and (_every(train.eval_steps, step) or step == total_steps):
                    with meter.apart(timers):
                        _evaluate(trainer, eval_rows, step, monitor, train, mesh)
                if leaving:
                    saver.settle()
                    if saved is not None:
                        _export(saved, train.output_dir, model.model_path, template, mesh)
                    raise Preempted(_why_leaving(preemption, step, total_steps, saved))
                for note in saver.notes():
                    monitor.note(note)
            _raise_what_failed(saver, monitor, mesh)
            for note in saver.notes():
                monitor.note(note)
            if first_step >= total_steps:
                of = f"of {total_steps}" if first_step == total_steps else f"and {total_steps} steps are asked for"
                monitor.note(f"nothing to do: the run is complete at step {first_step} {of}")
                if start.own:  # it may have been stopped before the export, and an older one may be there
                    saved = Path(start.checkpoint.where)
            if saved is not None:
                exported = _export(saved, train.output_dir, model.model_path, template, mesh)
                monitor.note(f"adapter: {saved}, and for peft: {exported}")


# ---- what the run starts from ----


@dataclass(frozen=True)
class _Start:
    """An adapter to go on from. own: it is a checkpoint of this output_dir, so the run must be the same."""

    checkpoint: AdapterCheckpoint
    own: bool


def _keep_others_out(lock: RunLock, mesh: ParallelMesh) -> str | None:
    """Locks output_dir until this run ends; returns a note where that cannot be done. Collective."""
    # The run before may be dying still. Of one that is started again, rank 0 may have been on another node, whose
    # torchrun gives it 30 s before it kills it.
    return on_first(lambda: lock.take(wait=30.0 if restarts() else 3.0), mesh.world)


def _overwrites(model: ModelArguments, train: TrainArguments, mesh: ParallelMesh) -> bool:
    """Whether the run in output_dir is to be removed, once all that is asked for has been looked at. Collective.

    Raises UserError where it holds the adapter to start from: until the first checkpoint that would be in memory alone.
    """

    def ask() -> bool:
        if not train.overwrite_output_dir:
            cancel_removal(train.output_dir)
            return False
        # A restart goes on with what the run has made, if it got so far as to remove what was there.
        if restarts() > 0 and not removal_is_pending(train.output_dir):
            return False
        named = model.resume_peft_from_checkpoint
        if named is not None and in_run(named, train.output_dir):
            raise UserError(
                f"resume_peft_from_checkpoint {named} lies in output_dir {train.output_dir}, which "
                f"overwrite_output_dir true clears: copy the adapter elsewhere, or name another output_dir"
            )
        announce_removal(train.output_dir)
        return True

    return on_first(ask, mesh.world)


def _find_start(model: ModelArguments, train: TrainArguments, overwrite: bool, mesh: ParallelMesh) -> _Start | None:
    """The newest sound checkpoint in output_dir, unless that is to be overwritten; else the adapter named by the user;
    else None. Collective."""

    def find() -> _Start | None:
        if not overwrite:
            saved, complaints = newest_sound(train.output_dir)
            if saved is not None:
                return _Start(replace(read_adapter(saved.folder), notes=tuple(complaints)), own=True)
            if complaints:
                raise UserError(
                    f"output_dir {train.output_dir}: no checkpoint in it is sound: {'; '.join(complaints)}; give "
                    f"--overwrite_output_dir true to start afresh"
                )
        named = model.resume_peft_from_checkpoint
        return None if named is None else _Start(open_adapter(named), own=False)

    return on_first(find, mesh.world)


def _lora_config(model: ModelArguments, start: _Start | None) -> LoraConfig:
    """From --lora_config, else the adapter that the run starts from, else the defaults of the model_type."""
    if model.lora_config is not None:
        lora_config = LoraConfig.from_json(model.lora_config)
        if lora_config.inference_mode:
            raise UserError(
                f"lora_config {model.lora_config}: inference_mode = true trains nothing: set it to false, or run "
                f"tools/generate.py"
            )
        return lora_config
    if start is not None:
        found = LoraConfig.from_dict(start.checkpoint.lora_config, start.checkpoint.where)
        return replace(found, inference_mode=False)
    return LoraConfig()


def _check_same_adapter(lora: ResolvedLora, start: _Start | None, config: ModelConfig) -> None:
    """Raises UserError where --lora_config means another adapter than the one to start from."""
    if start is None:
        return
    theirs = resolve_lora(LoraConfig.from_dict(start.checkpoint.lora_config, start.checkpoint.where), config)
    ours = {name: (adapter.r, adapter.scaling) for name, adapter in lora.adapters.items()}
    other = {name: (adapter.r, adapter.scaling) for name, adapter in theirs.adapters.items()}
    for name in sorted(ours.keys() | other.keys()):
        if ours.get(name) != other.get(name):
            raise UserError(
                f"adapter {start.checkpoint.where}: {name} has (r, scaling) = {other.get(name)}, but --lora_config "
                f"means {ours.get(name)}: {_other_adapter(start)}"
            )
    if trained_shapes(lora, config) != trained_shapes(theirs, config):
        raise UserError(
            f"adapter {start.checkpoint.where}: bias = {theirs.config.bias!r}, but --lora_config says "
            f"{lora.config.bias!r}: {_other_adapter(start)}"
        )


def _other_adapter(start: _Start) -> str:
    remedy = "leave --lora_config out, or name the one that the adapter was made with"
    return f"{remedy}; or name another output_dir, or give --overwrite_output_dir true" if start.own else remedy


def _first_step(start: _Start | None, identity: Mapping[str, str]) -> tuple[int, str]:
    """(steps already done, a line that says so). Raises UserError where output_dir holds another run."""
    if start is None:
        return 0, ""
    before, where = progress(start.checkpoint), start.checkpoint.where
    if before is None:
        return 0, f"starting from the adapter {where}"
    values = identity_difference(before.identity, identity)
    if not values:
        return before.step, f"continuing after step {before.step} of {where}"
    if start.own:
        raise UserError(
            f"output_dir holds {where}, a checkpoint of another run ({values}): name another output_dir, or give "
            f"--overwrite_output_dir true"
        )
    check_base(start.checkpoint, identity)
    return 0, f"starting from the adapter {where} at step 0, because its run was another ({values})"


def _settings(train: TrainArguments, dtype: torch.dtype, total_steps: int) -> dict[str, str]:
    """What may change between the parts of one run, but hardly does by intention."""
    named = (
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optimizer"),
        *("adam_beta1", "adam_beta2", "adam_epsilon"),
    )
    values = {name: str(getattr(train, name)) for name in named}
    return values | {"dtype": str(dtype).removeprefix("torch."), "steps of the run": str(total_steps)}


def _changed(checkpoint: AdapterCheckpoint, settings: Mapping[str, str]) -> list[str]:
    """A line where the run goes on with other settings than it had."""
    before = (checkpoint.trainer or {}).get("settings")
    difference = identity_difference(before, settings) if isinstance(before, dict) else ""
    return [f"goes on with other settings ({difference})"] if difference else []


def _raise_what_failed(saver: RunSaver, monitor: Monitor, mesh: ParallelMesh) -> None:
    """Waits for the save under way. Raises, on every rank, what could not be written. Collective."""
    saver.settle()
    with together(mesh.world):
        monitor.check()


def _why_leaving(preemption: Preemption, step: int, total_steps: int, saved: Path | None) -> str:
    kept = f"saved in {saved}: the same command goes on from there" if saved else "with nothing saved (--save false)"
    return f"stopped by {preemption.signal_name or 'a signal'} after step {step} of {total_steps}, {kept}"


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def _export(checkpoint: Path, output_dir: str, model_path: str, template: ChatTemplate, mesh: ParallelMesh) -> Path:
    """The adapter of a checkpoint as a PEFT folder beside the checkpoints. Collective."""
    folder = export_folder(output_dir)

    def export() -> None:
        adapter = read_adapter(checkpoint)
        write_peft(folder, adapter.tensors, {**adapter.lora_config, "inference_mode": True}, model_path)
        _leave_tokenizer(template, folder)

    on_first(export, mesh.world)
    return folder


def _leave_tokenizer(template: ChatTemplate, folder: Path) -> None:
    """The run's tokenizer and template, for whoever uses its adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    template.write(folder)


def _reduced_megabytes(config: ModelConfig, data: DataArguments, train: TrainArguments, dtype: torch.dtype) -> float:
    """What tensor parallelism reduces in one layer and microbatch: twice in forward, twice in backward."""
    tokens = train.per_device_train_batch_size * data.seq_length
    return 4 * tokens * config.hidden_size * dtype.itemsize / 1e6


# ---- rows ----


def _check_length(
    config: ModelConfig,
    data: DataArguments,
    train: TrainArguments,
    sequence_parallel: bool,
    mesh: ParallelMesh,
) -> None:
    if data.seq_length > config.max_position_embeddings:
        raise UserError(
            f"seq_length ({data.seq_length}) is more than the model's max_position_embeddings "
            f"({config.max_position_embeddings}): choose at most that"
        )
    tokens = train.per_device_train_batch_size * data.seq_length
    if sequence_parallel and tokens % mesh.tp.size:
        raise UserError(
            f"per_device_train_batch_size ({train.per_device_train_batch_size}) * seq_length ({data.seq_length}) = "
            f"{tokens} tokens are not a multiple of tensor_parallel_size ({mesh.tp.size}), as --sequence_parallel "
            f"needs: change seq_length"
        )


def _not_sequence_parallel(tokens: int, tp: int) -> str:
    why = f"{tokens} tokens of a microbatch are no multiple of {tp}" if tokens % tp else "as asked"
    return f"tensor-parallel ranks hold all activations between layers: {why}"


def _load_rows(
    template: ChatTemplate, data: DataArguments, train: TrainArguments
) -> tuple[PackedRows, PackedRows | None]:
    """The rows to train on, and those of the evaluation."""
    settings = data_settings(data)
    rows, held_out = load_split(data.data_path, template, settings, train.seed, data.eval_fraction or 0.0)
    if data.eval_data_path is None:
        return rows, held_out
    return rows, load_dataset(data.eval_data_path, template, replace(settings, check_names=False), train.seed)


def _workload(rows: PackedRows, train: TrainArguments, parallel: ParallelArguments, dtype: torch.dtype) -> Workload:
    """A mean microbatch of the run, for what stages are reckoned to take."""
    return Workload(
        train.per_device_train_batch_size,
        rows.seq_length,
        context=_context(rows),
        labelled=rows.labelled_tokens / rows.tokens,
        element=dtype.itemsize,
        sequence_parallel=parallel.sequence_parallel,
        recompute=parallel.recompute,
    )


def _loader(rows: PackedRows, train: TrainArguments, mesh: ParallelMesh, shuffle: bool = True) -> Loader:
    return Loader(
        rows,
        micro_batch_rows=train.per_device_train_batch_size,
        num_microbatches=train.gradient_accumulation_steps,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        seed=train.seed,
        shuffle=shuffle,
    )


def _evaluate(
    trainer: Trainer, rows: PackedRows, step: int, monitor: Monitor, train: TrainArguments, mesh: ParallelMesh
) -> None:
    loader = _loader(rows, train, mesh, shuffle=False)
    loss = trainer.evaluate(loader.step(i) for i in range(loader.steps_per_epoch))
    perplexity = math.exp(loss) if loss < 700 else math.inf
    monitor.evaluation({"step": step, "loss": loss, "perplexity": perplexity})


# ---- what the run shows ----


def _write_profile(
    profiler: Profiler,
    arguments: FinetuneArguments,
    config: ModelConfig,
    lora: ResolvedLora,
    stage: Stage,
    cut: Cut,
    work: Workload,
    mesh: ParallelMesh,
    device: torch.device,
) -> str:
    """The recorded steps beside what they were predicted to take, in files; returns a line that says so. Collective."""
    layout = Layout(
        mesh.tp.size,
        mesh.pp.size,
        mesh.dp.size,
        arguments.parallel.schedule,
        arguments.parallel.virtual_pipeline_size,
        arguments.train.gradient_accumulation_steps,
        work,
        cuda_graphs=stage.uses_graphs,
        tp_comm_overlap=stage.place.exchange is not None,
    )
    recorded = profiler.collect(mesh.world)
    folder = Path(arguments.train.output_dir) / "profile"
    plan = predicted(config, lora, layout, cut.layers, device)
    model, kind = model_words(config), device_of(device).name
    return on_first(lambda: write_profile(folder, recorded, plan, model, kind), mesh.world)


class _Meter:
    """Tokens and seconds since the last logged step."""

    def __init__(self, flops_per_token: float, devices: int):
        self._flops_per_token, self._devices = flops_per_token, devices
        self._restart()

    def _restart(self) -> None:
        self._tokens, self._earlier, self._start = 0, 0, time.perf_counter()
        self._phases: dict[str, float] = {}

    def state(self) -> dict[str, int]:
        """What `go_on` takes."""
        return {"tokens_since_log": self._earlier + self._tokens}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Counts on from a run that stopped between two logged steps."""
        earlier = state.get("tokens_since_log", 0)
        self._earlier = earlier if isinstance(earlier, int) else 0

    @contextlib.contextmanager
    def apart(self, timers: Timers) -> Iterator[None]:
        """What runs inside belongs to no step: its time and its phases are left out."""
        self._collect(timers)
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start
        timers.collect()

    def _collect(self, timers: Timers) -> None:
        for phase, seconds in timers.collect().items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def record(self, step: int, result: StepResult, timers: Timers) -> dict[str, Any]:
        """The record of a logged step; tokens counts all of them since the last record."""
        speed = self._tokens / max(1e-9, time.perf_counter() - self._start)
        record = {
            "step": step,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": self._earlier + self._tokens,
            "tokens_per_second": speed,
            "tflops": speed * self._flops_per_token / self._devices / 1e12,
        }
        if timers.enabled:
            self._collect(timers)
            record["phases"] = self._phases
        self._restart()
        return record


def _context(rows: PackedRows) -> float:
    """Keys that a token attends to on average."""
    return causal_context(rows.lengths.tolist())


def _flops_per_token(config: ModelConfig, lora: ResolvedLora, rows: PackedRows) -> float:
    whole = {name: p.numel() for name, p in whole_on_meta(config).named_parameters(remove_duplicate=False)}
    frozen = sum(n for name, n in whole.items() if "_proj.weight" in name or name == "lm_head.weight")
    return lora_flops_per_token(
        frozen_matmul_parameters=frozen,
        lora_parameters=_lora_parameters(config, lora),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        context=_context(rows),
    )


def _lora_parameters(config: ModelConfig, lora: ResolvedLora) -> int:
    shapes = expected_weights(config)
    return sum(adapter.r * sum(shapes[f"{name}.weight"]) for name, adapter in lora.adapters.items())


def _summary(
    arguments: FinetuneArguments,
    config: ModelConfig,
    lora: ResolvedLora,
    stage: Stage,
    cut: Cut,
    rows: PackedRows,
    loader: Loader,
    mesh: ParallelMesh,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, dict[str, Any]]:
    """The start-up table. Collective: memory is that of the fullest rank."""
    parallel, train = arguments.parallel, arguments.train
    shapes = expected_weights(config)
    frozen = sum(math.prod(shape) for shape in shapes.values())
    trainable = _lora_parameters(config, lora)
    trainable += sum(math.prod(shapes[n]) for n in trained_shapes(lora, config) if n.endswith(".bias"))
    stored = sum(p.numel() * p.element_size() for p in stage.parameters())
    trained = sum(p.numel() * p.element_size() for p in stage.trainable().values())
    memory = max(gather_objects(stored + 3 * trained, mesh.world))  # gradient and two moments beside the masters
    stages = {
        f"stage {s}": f"layers {' and '.join(f'{part[0]} to {part[-1]}' for part in cut.layers[s :: mesh.pp.size])}"
        + (", embedding" if s == 0 else "")
        + (", head" if s == mesh.pp.size - 1 else "")
        + f", {sum(cut.shares[s :: mesh.pp.size]):.1%} of the compute"
        + (", no backward" if s + len(cut.layers) - mesh.pp.size < cut.floor else "")
        for s in range(mesh.pp.size)
    }
    targets = sorted({name.rsplit(".", 1)[-1] for name in lora.adapters})
    recompute = f", recompute {parallel.recompute}" if parallel.recompute != "none" else ""
    sequence = ", sequence parallel" if parallel.sequence_parallel else ""
    sequence += ", messages beside products" if stage.place.exchange is not None else ""
    waiting = ""
    if mesh.pp.size > 1:
        schedule, microbatches = SCHEDULES[parallel.schedule], train.gradient_accumulation_steps
        waiting = f", stages wait {schedule.waiting(mesh.pp.size, microbatches, cut.floor, cut.shares):.0%} of the time"
    return {
        "model": {
            "path": arguments.model.model_path,
            "type": f"{config.model_type}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
            "parameters": f"{frozen:,} frozen, {trainable:,} trained ({100 * trainable / frozen:.3f}%)",
            "adapters": f"{len(lora.adapters)} linears ({', '.join(targets)}), r {lora.config.r}, "
            f"alpha {lora.config.lora_alpha:g}, dropout {lora.config.lora_dropout:g}",
        },
        "layout": {
            "processes": f"{mesh.world_size} = tensor {mesh.tp.size} x pipeline {mesh.pp.size} x data "
            f"{mesh.dp.size}{sequence}",
            **stages,
            "schedule": f"{parallel.schedule}, {train.gradient_accumulation_steps} microbatches{recompute}{waiting}",
            "device": f"{device.type}, {str(dtype).removeprefix('torch.')}, "
            f"{'compiled' if extension.has_kernels(device.type) else 'plain torch'} ops"
            f"{', CUDA graphs' if stage.uses_graphs else ''}",
            "memory": f"{memory / 2**30:.2f} GiB of weights and optimizer on the fullest rank",
        },
        "data": {
            "rows": f"{rows.documents:,} documents in {rows.rows:,} rows of {rows.seq_length} tokens",
            "tokens": f"{rows.tokens:,}, {rows.labelled_tokens:,} of them labelled",
            "step": f"{loader.global_batch_rows} rows, {loader.steps_per_epoch} steps an epoch",
        },
    }
