"""What a run starts from: an output_dir of its own, the rows, the adapter, and the step after which it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.adapters.sharing import in_common
from megalora.added_tokens import AddedToken
from megalora.building import (
    base_names,
    check_vocabulary,
    resolve_base,
    resolve_lora,
    settle_head,
    trained_shapes,
)
from megalora.checkpoint.adapter.shards import AdapterCheckpoint, read_adapter
from megalora.checkpoint.base.weights import unread_layers
from megalora.checkpoint.run.folder import announce_removal, cancel_removal, check_own, in_run, removal_is_pending
from megalora.checkpoint.run.state import identity_difference, newest_sound
from megalora.cluster.launch import restarts
from megalora.cluster.lock import RunLock
from megalora.compute_dtype import ComputeDtype, choose_dtype
from megalora.data import Loader, PackedRows, Rendering, load_dataset, load_split
from megalora.data.classes import ClassRows
from megalora.data.tokenizer import new_tokens
from megalora.errors import UserError
from megalora.flags import DataArguments, FinetuneArguments, ModelArguments, TrainArguments
from megalora.hub import check_hub
from megalora.identity import (
    adapter_for,
    adapter_labels,
    base_identity,
    check_base,
    other_base,
    other_template,
    progress,
    run_identity,
)
from megalora.models.config import check_context, check_layout, check_length, check_task, read_config
from megalora.models.dropouts import base_dropouts, choose_base_dropout, told
from megalora.models.multimodal import unread_note
from megalora.models.spec import ModelSpec
from megalora.parallel.collectives import on_first, tell_stage, together
from megalora.parallel.mesh import Axis, ParallelMesh
from megalora.rows import data_settings, rendering
from megalora.sample_replies import SampleReplies
from megalora.scored_replies import ScoredReplies
from megalora.vocabulary import adapter_tokens, train_rows_of, with_rows_for


@dataclass(frozen=True)
class Start:
    """An adapter to go on from. own: it is a checkpoint of this output_dir, so the run must be the same."""

    checkpoint: AdapterCheckpoint
    own: bool

    @property
    def dtype(self) -> str | None:
        """Name of the compute dtype of the run that is continued; None where this is another run."""
        settings = (self.checkpoint.trainer or {}).get("settings") if self.own else None
        return settings.get("dtype") if isinstance(settings, dict) else None


@dataclass(frozen=True)
class Beginning:
    """Everything that is decided before anything is built; the same on every rank.

    compute    the compute dtype
    base_format  of the frozen linears, one of choices.BASE_FORMATS
    weights    the folder of the base weights
    overwrite  the run that is in output_dir is removed before the first step
    identity   what must not change between the parts of one run; settings: what may
    template   how rows become documents, which the run's checkpoints and export carry
    samples, scored  what the run replies to while it trains, where it does: prompts of a file, evaluation rows
    evaluations  rows of each evaluation set, by name ("": that of one without a name)
    notes      lines for the user
    """

    config: ModelSpec
    lora: ResolvedLora
    compute: ComputeDtype
    base_format: str
    weights: str
    template: Rendering
    loader: Loader
    evaluations: Mapping[str, Loader]
    samples: SampleReplies | None
    scored: ScoredReplies | None
    start: Start | None
    overwrite: bool
    identity: dict[str, str]
    settings: dict[str, str]
    first_step: int
    total_steps: int
    notes: tuple[str, ...]

    @property
    def continues(self) -> bool:
        """Whether output_dir holds this run already."""
        return self.start is not None and self.start.own


def begin(arguments: FinetuneArguments, lock: RunLock, mesh: ParallelMesh, device: torch.device) -> Beginning:
    """Look at everything that is asked for. Collective. Raises UserError, on every rank, for what the user can fix."""
    model, data, train, parallel = arguments.model, arguments.data, arguments.train, arguments.parallel
    with together(mesh.world):
        config = read_config(model.model_path)
        check_layout(config, mesh.tp.size, mesh.pp.size, parallel.uneven_heads)
        _check_recompute(config, parallel.recompute_layers)
        notes = _check_length(config, data, train, parallel.sequence_parallel, mesh)
        asked = base_dropouts(config)
        config = choose_base_dropout(config, train.base_dropout)
    weights = model.resume_from_checkpoint or model.model_path
    not_locked = _keep_others_out(lock, mesh)
    notes += [not_locked] if not_locked else []
    overwrite = _overwrites(model, train, mesh)
    start = _find_start(model, train, overwrite, mesh)
    compute = choose_dtype(model.dtype, device, mesh.world, None if start is None else start.dtype)
    with together(mesh.world):
        lora_config = _lora_config(model, start, config)
        check_task(lora_config.task_type, config, "lora_config")
        check_context(config, mesh.cp.size, lora_config.task_type)
        recorded = () if start is None else adapter_labels(start.checkpoint)
    added = on_first(lambda: _added_tokens(arguments, start), mesh.world)
    template = rendering(lora_config.task_type, config, model.model_path, data, recorded, mesh.world, added)
    config = config.for_task(lora_config.task_type, template.labels if isinstance(template, ClassRows) else ())
    config, settled = on_first(lambda: _settled(config, weights), mesh.world)
    notes += [*(note for note in (*settled, unread_note(config, model.model_path)) if note), *template.notes]
    with together(mesh.world):
        config = with_rows_for(config, added, model.model_path, None if start is None else start.checkpoint.tensors)
        lora = resolve_lora(train_rows_of(lora_config, config, added), config)
        start = _checked_start(start, lora, config)
        rows, eval_rows = _load_rows(template, data, train, mesh.world)
        check_vocabulary(max(one.max_token_id for one in (rows, *eval_rows.values())), config, model.model_path)
    loader = _loader(rows, train, mesh, config)
    base = on_first(lambda: base_identity(config, weights, template.tokenizer), mesh.world)
    base_format = resolve_base(model.base_format, config).name
    dropout = None if not asked else told(base_dropouts(config)) or "off"
    identity = run_identity(
        base, base_format, lora.config, template, rows, loader.global_batch_rows, train.seed, dropout
    )  # fmt: skip
    with together(mesh.world):
        first_step, start_note = _first_step(start, identity)
        total_steps = train.total_steps(loader.steps_per_epoch)
        settings = _settings(train, compute.dtype, total_steps)
        if start is not None:
            notes += [*start.checkpoint.notes, start_note, *other_template(start.checkpoint, template)]
            notes += other_base(start.checkpoint, base_format, model.model_path)
            if start.own and model.resume_peft_from_checkpoint is not None:
                named = model.resume_peft_from_checkpoint
                notes.append(f"resume_peft_from_checkpoint {named} is not read: the run in output_dir goes on")
        if first_step:
            notes += _changed(start.checkpoint, settings)
    return Beginning(
        config=config,
        lora=lora,
        compute=compute,
        base_format=base_format,
        weights=weights,
        template=template,
        loader=loader,
        evaluations={name: _loader(one, train, mesh, config, shuffle=False) for name, one in eval_rows.items()},
        samples=SampleReplies.of(arguments, config, lora_config.task_type, template, mesh),
        scored=ScoredReplies.of(arguments, config, lora_config.task_type, template, eval_rows, mesh),
        start=start,
        overwrite=overwrite,
        identity=identity,
        settings=settings,
        first_step=first_step,
        total_steps=total_steps,
        notes=tuple(notes),
    )


# ---- output_dir and the adapter to start from ----


def _check_recompute(config: ModelSpec, layers: int | None) -> None:
    if layers is not None and layers > config.num_hidden_layers:
        raise UserError(
            f"recompute_layers ({layers}) is more than num_hidden_layers ({config.num_hidden_layers})",
            f"give at most {config.num_hidden_layers}, or leave it out to recompute all",
        )


def _keep_others_out(lock: RunLock, mesh: ParallelMesh) -> str | None:
    """Lock output_dir until this run ends; return a note where that cannot be done. Collective."""
    # The run before may be dying still. Of one that is started again, rank 0 may have been on another node, whose
    # torchrun gives it 30 s before it kills it.
    return on_first(lambda: lock.take(wait=30.0 if restarts() else 3.0), mesh.world)


def _overwrites(model: ModelArguments, train: TrainArguments, mesh: ParallelMesh) -> bool:
    """Return whether the run in output_dir is to be removed, once all that is asked for has been looked at. Collective.

    Raises UserError where it holds the adapter to start from: until the first checkpoint that would be in memory alone.
    """

    def ask() -> bool:
        check_own(train.output_dir)
        if train.push_to_hub is not None:
            check_hub(train.push_to_hub)
        if not train.overwrite_output_dir:
            if not train.dry_run:
                cancel_removal(train.output_dir)
            return False
        # A restart goes on with what the run has made, if it got so far as to remove what was there.
        if restarts() > 0 and not removal_is_pending(train.output_dir):
            return False
        named = model.resume_peft_from_checkpoint
        if named is not None and in_run(named, train.output_dir):
            raise UserError(
                f"resume_peft_from_checkpoint {named} lies in output_dir {train.output_dir}, which "
                "overwrite_output_dir true clears",
                "copy the adapter elsewhere, or name another output_dir",
            )
        if not train.dry_run:
            announce_removal(train.output_dir)
        return True

    return on_first(ask, mesh.world)


def _find_start(model: ModelArguments, train: TrainArguments, overwrite: bool, mesh: ParallelMesh) -> Start | None:
    """Return the newest sound checkpoint in output_dir, unless that is to be overwritten; else the adapter named by the
    user; else None. Collective.
    """

    def find() -> Start | None:
        if not overwrite:
            saved, complaints = newest_sound(train.output_dir)
            if saved is not None:
                return Start(replace(read_adapter(saved.folder), notes=tuple(complaints)), own=True)
            if complaints:
                raise UserError(
                    f"output_dir {train.output_dir}: no checkpoint in it is sound: {'; '.join(complaints)}",
                    "give --overwrite_output_dir true to start afresh",
                )
        named = model.resume_peft_from_checkpoint
        return None if named is None else Start(adapter_for(named, model.model_path), own=False)

    return on_first(find, mesh.world)


def _settled(config: ModelSpec, weights: str) -> tuple[ModelSpec, tuple[str | None, ...]]:
    """Return the spec with the head that the weights have, and lines on what they hold beside it."""
    config, own_head = settle_head(config, weights)
    return config, (own_head, unread_layers(weights, base_names(config)))


def _lora_config(model: ModelArguments, start: Start | None, config: ModelSpec) -> LoraConfig:
    """Read it from --lora_config, else the adapter that the run starts from, else the defaults of the model_type."""
    if model.lora_config is not None:
        lora_config = LoraConfig.from_json(model.lora_config)
        if lora_config.inference_mode:
            raise UserError(
                f"lora_config {model.lora_config}: inference_mode = true trains nothing",
                "set it to false, or run tools/generate.py",
            )
        return lora_config
    if start is not None:
        found = LoraConfig.from_dict(start.checkpoint.lora_config, start.checkpoint.where)
        return replace(found, inference_mode=False)
    return LoraConfig(task_type="CAUSAL_LM" if config.encoder is None else "SEQ_2_SEQ_LM")


def _added_tokens(arguments: FinetuneArguments, start: Start | None) -> tuple[AddedToken, ...]:
    """Return the tokens that the tokenizer gets: those of the adapter to start from, or those that are asked for.

    For one rank: it reads. Raises UserError where the two are not the same.
    """
    names, model_path = arguments.data.new_special_tokens, arguments.model.model_path
    if start is None:
        return new_tokens(model_path, names) if names else ()
    found = adapter_tokens(start.checkpoint, model_path)
    has = [token.content for token in found]
    if names is not None and has != list(names):
        raise UserError(
            f"adapter {start.checkpoint.where}: has {f'the new tokens {has}' if has else 'no new tokens'}, but "
            f"new_special_tokens names {list(names)}",
            _other_adapter(start, "new_special_tokens"),
        )
    return found


def _checked_start(start: Start | None, lora: ResolvedLora, config: ModelSpec) -> Start | None:
    """Return what the run starts from, with one factor for all experts where the run shares it.

    Raises UserError where --lora_config means another adapter.
    """
    if start is None:
        return None
    ours = lora.config
    if ours.expert_count is not None and not start.checkpoint.lora_config.get("expert_count"):
        tensors = in_common(start.checkpoint.tensors, ours.expert_lora, start.checkpoint.where)
        more = {"expert_lora": ours.expert_lora, "expert_count": ours.expert_count}
        fields = start.checkpoint.lora_config | more
        start = replace(start, checkpoint=replace(start.checkpoint, tensors=tensors, lora_config=fields))
    _check_same_adapter(lora, start, config)
    return start


def _check_same_adapter(lora: ResolvedLora, start: Start, config: ModelSpec) -> None:
    """Raise UserError where --lora_config means another adapter than the one to start from."""
    theirs = resolve_lora(LoraConfig.from_dict(start.checkpoint.lora_config, start.checkpoint.where), config)
    ours = {name: (adapter.r, adapter.scaling) for name, adapter in lora.adapters.items()}
    other = {name: (adapter.r, adapter.scaling) for name, adapter in theirs.adapters.items()}
    for name in sorted(ours.keys() | other.keys()):
        if ours.get(name) != other.get(name):
            raise UserError(
                f"adapter {start.checkpoint.where}: {name} has (r, scaling) = {other.get(name)}, but --lora_config "
                f"means {ours.get(name)}",
                _other_adapter(start),
            )
    for name in sorted(lora.tokens.keys() | theirs.tokens.keys()):
        if lora.tokens.get(name) != theirs.tokens.get(name):
            trained, meant = (list(one.tokens.get(name, ())) for one in (theirs, lora))
            raise UserError(
                f"adapter {start.checkpoint.where}: of {name} it trained the rows of tokens {trained}, but "
                f"--lora_config means {meant}",
                _other_adapter(start),
            )
    here, there = trained_shapes(lora, config), trained_shapes(theirs, config)
    if different := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        name = different[0]
        shape, wanted = ("nothing" if one is None else str(list(one)) for one in (there.get(name), here.get(name)))
        raise UserError(
            f"adapter {start.checkpoint.where}: of {name} it trained {shape}, but --lora_config means {wanted}",
            _other_adapter(start),
        )


def _other_adapter(start: Start, flag: str = "lora_config") -> str:
    what = "the one" if flag == "lora_config" else "those"
    remedy = f"leave --{flag} out, or name {what} that the adapter was made with"
    return f"{remedy}; or name another output_dir, or give --overwrite_output_dir true" if start.own else remedy


def _first_step(start: Start | None, identity: Mapping[str, str]) -> tuple[int, str]:
    """Return (steps already done, a line that says so). Raises UserError where output_dir holds another run."""
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
            f"output_dir holds {where}, a checkpoint of another run ({values})",
            "name another output_dir, or give --overwrite_output_dir true",
        )
    check_base(start.checkpoint, identity)
    return 0, f"starting from the adapter {where} at step 0, because its run was another ({values})"


def _settings(train: TrainArguments, dtype: torch.dtype, total_steps: int) -> dict[str, str]:
    """Return what may change between the parts of one run, but hardly does by intention."""
    named = (
        *("learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optimizer"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "loraplus_lr_ratio"),
    )
    values = {name: str(getattr(train, name)) for name in named}
    values["warmup_steps"] = str(train.warmup(total_steps))
    # Newer ones only where they say something: older checkpoints lack them.
    values |= {name: str(value) for name, value in train.learning_rate_shape.items()}
    return values | {"dtype": str(dtype).removeprefix("torch."), "steps of the run": str(total_steps)}


def _changed(checkpoint: AdapterCheckpoint, settings: Mapping[str, str]) -> list[str]:
    """Return a line where the run goes on with other settings than it had."""
    before = (checkpoint.trainer or {}).get("settings")
    difference = identity_difference(before, settings) if isinstance(before, dict) else ""
    return [f"goes on with other settings ({difference})"] if difference else []


# ---- rows ----


def _check_length(
    config: ModelSpec,
    data: DataArguments,
    train: TrainArguments,
    sequence_parallel: bool,
    mesh: ParallelMesh,
) -> list[str]:
    """Return lines for the user on the length of a row. Raises UserError where it cannot be trained."""
    longer = check_length(config, data.seq_length)
    tokens, parts = train.per_device_train_batch_size * data.seq_length, mesh.cp.size
    parts *= mesh.tp.size if sequence_parallel else 1
    if config.encoder is not None:
        check_length(config, data.source_tokens, "source_length")
        tokens_of_sources = train.per_device_train_batch_size * data.source_tokens
        if tokens_of_sources % parts:
            raise UserError(
                f"per_device_train_batch_size ({train.per_device_train_batch_size}) * source_length "
                f"({data.source_tokens}) = {tokens_of_sources} tokens are not a multiple of tensor_parallel_size "
                f"({mesh.tp.size}), as --sequence_parallel needs",
                "change source_length",
            )
    if tokens % parts:
        sizes = f"tensor_parallel_size ({mesh.tp.size})" if sequence_parallel else ""
        if mesh.cp.size > 1:
            sizes = f"context_parallel_size ({mesh.cp.size})" + (f" * {sizes}" if sizes else "")
        why = ", as --sequence_parallel needs" if sequence_parallel and mesh.cp.size == 1 else ""
        raise UserError(
            f"per_device_train_batch_size ({train.per_device_train_batch_size}) * seq_length ({data.seq_length}) = "
            f"{tokens} tokens are not a multiple of {sizes}{why}",
            "change seq_length",
        )
    return [longer] if longer else []


def _load_rows(
    template: Rendering, data: DataArguments, train: TrainArguments, world: Axis
) -> tuple[PackedRows, dict[str, PackedRows]]:
    """Return the rows to train on, and those of each evaluation set by its name."""
    settings = data_settings(data)
    tell_stage(f"reading rows of {data.data_path}", world)
    rows, held_out = load_split(data.data_path, template, settings, train.seed, data.eval_fraction or 0.0)
    if held_out is not None:
        return rows, {"": held_out}
    settings = replace(settings, check_names=False)
    return rows, {name: load_dataset(path, template, settings, train.seed) for name, path in data.evaluations}


def _loader(
    rows: PackedRows, train: TrainArguments, mesh: ParallelMesh, config: ModelSpec, shuffle: bool = True
) -> Loader:
    return Loader(
        rows,
        micro_batch_rows=train.per_device_train_batch_size,
        num_microbatches=train.gradient_accumulation_steps,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        seed=train.seed,
        shuffle=shuffle,
        cp_rank=mesh.cp.rank,
        cp_size=mesh.cp.size,
        # The linears of a layer take about 24 H^2 FLOPs for a token, and attention 2 H of them for each key (H: width).
        token_work=12 * config.hidden_size,
    )
