"""From a config and a mesh to this rank's stage, and to the engine that trains it: what commands, tests and benchmarks
share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.adapters.sharing import counted, factor_keys
from megalora.checkpoint.base.weights import BaseNames, has_own_head, load_base
from megalora.errors import UserError
from megalora.models.config import check_layout
from megalora.models.graphs import choose_graphs, layer_facts
from megalora.models.spec import ClassHead, Head, ModelSpec, RecurrentMixer
from megalora.models.stage import NO_LORA, Stage
from megalora.models.state_spaces import by_name
from megalora.optimizer import AdapterOptimizer, LossScale
from megalora.parallel.collectives import on_first, together
from megalora.parallel.e4m3 import decoded_note
from megalora.parallel.formats import BaseFormat
from megalora.parallel.grads import FlatGradients
from megalora.parallel.group import LinearGroup
from megalora.parallel.linear import MAGNITUDE
from megalora.parallel.mesh import Clock, ParallelMesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import Split, named_splits
from megalora.pipeline.actions import Action
from megalora.pipeline.p2p import Neighbours
from megalora.pipeline.runner import PipelineRunner
from megalora.pipeline.schedule import SCHEDULES
from megalora.planning.devices import device_of
from megalora.planning.fitting import AS_GIVEN, Fit, Fitting, StageUse, of_all_stages
from megalora.planning.memory import exchange_bytes
from megalora.planning.nodes import Workload
from megalora.planning.shapes import shape_of
from megalora.planning.timing import LayerCosts, cut_layers, layer_costs
from megalora.profiling import measured_costs, read_profile
from megalora.tasks import TASKS
from megalora.training import Trainer


def resolve_base(name: str, config: ModelSpec) -> BaseFormat:
    """Return the format of the frozen linears for one stage; "auto" is that of the model's files."""
    found = config.stored if name == "auto" else name
    return BaseFormat(found, as_stored=name == "auto" and found != "dense")


def resolve_lora(lora_config: LoraConfig, config: ModelSpec) -> ResolvedLora:
    """Return the adapters of the model's linears. Raises UserError where the two do not fit."""
    biased = [mixer.told for mixer in config.mixers if isinstance(mixer, RecurrentMixer) and mixer.biased]
    biased += ["norms"] if any(norm.bias for norm in config.norms) else []
    if lora_config.bias == "all" and biased:
        raise UserError(
            f"lora_config: bias = 'all' is not implemented for {config.model_type}, whose {biased[0]} have biases",
            "choose none or lora_only",
        )
    layers = {name: placed.layer for name, placed in config.linears.items()}
    head, stacks = config.head, config.stacked_linears
    if isinstance(head, ClassHead):
        lora_config = replace(lora_config, modules_to_save=_beside_head(lora_config.modules_to_save, head))
    ends = (*((head.name,) if isinstance(head, Head) else ()), config.embedding.name)
    without = () if isinstance(head, Head) else head.names  # of a classifier, trained in full
    left = config.routers | by_name(config)
    resolved = lora_config.resolve(config.model_type, layers, ends, config.vocab_size, without, left, stacks)
    if config.encoder is not None and any(resolved.words(end).trains for end in ends):
        raise UserError(
            f"lora_config: training the embedding or the head of {config.model_type} is not implemented: encoder, "
            "decoder and head read the same words, mostly on several stages, and their gradients are not summed",
            f"leave {' and '.join(ends)} out of target_modules and modules_to_save, and trainable_token_indices too",
        )
    stacked = tuple(stack for stack, names in stacks.items() if not resolved.adapters.keys().isdisjoint(names))
    apart = resolved.adapters.keys() & config.linears.keys() - config.in_stacks
    transposed = any(config.linears[name].linear.transposed for name in apart)
    if lora_config.fan_in_fan_out and not transposed:
        raise UserError(
            f"lora_config: fan_in_fan_out = true is for weights stored as [in, out], and none that is adapted in this "
            f"{config.model_type} model is",
            "remove the field",
        )
    told = counted(lora_config, resolved.adapters, config.linears)
    if config.prefix is not None or config.files.beside:  # short names would mean linears of images too, for peft
        told = replace(told, target_modules=tuple(sorted(resolved.adapters)))
    return replace(resolved, config=replace(told, fan_in_fan_out=transposed, target_parameters=stacked or None))


def _beside_head(saved: tuple[str, ...] | None, head: ClassHead) -> tuple[str, ...] | None:
    """Return modules_to_save without the modules of a classifier's head that are trained in any case."""
    trained = [linear.name for linear in head.linears if head.trains(linear)]
    return saved and tuple(n for n in saved if not any(name == n or name.startswith(f"{n}.") for name in trained))


@dataclass(frozen=True)
class Cut:
    """How the model is cut into parts: their layers, the first that has something to train, and the share of a step's
    compute that each is reckoned to have.

    A part is a stage, or with several chunks a stage, chunk c of stage s of p is part c p + s. fit: what of this rank's
    stage is computed again, and what it needs; None where nothing is trained.
    """

    layers: tuple[range, ...]
    floor: int
    shares: tuple[float, ...]
    fit: Fit | None = field(default=None, compare=False)  # every rank has its own


def build_stage(
    config: ModelSpec,
    mesh: ParallelMesh,
    lora: ResolvedLora,
    place: Placement,
    *,
    partition_method: str = "uniform",
    custom_partition: tuple[int, ...] | None = None,
    virtual_pipeline_size: int = 1,
    uneven_heads: bool = False,
    workload: Workload | None = None,
    profile_file: str | None = None,
    schedule: str = "1f1b",
    fitting: Fitting = AS_GIVEN,
) -> tuple[Stage, Cut]:
    """Build this rank's stage, parameters not filled yet. Collective. Raises UserError where it cannot be cut so.

    workload      a microbatch of the run, for the stages' costs; None where nothing is trained
    profile_file  a trace of megalora.profiling: the costs of the workload are made to add up to what it measured
    schedule      one of SCHEDULES, and `fitting`: what of the workload's layers is computed again
    """
    check_layout(config, mesh.tp.size, mesh.pp.size, uneven_heads)
    lora.words(config.embedding.name).check_stages(config.head.tied, mesh.pp.size)
    parts = mesh.pp.size * virtual_pipeline_size
    if virtual_pipeline_size > 1 and parts > config.num_hidden_layers:
        raise UserError(
            f"pipeline_parallel_size ({mesh.pp.size}) * virtual_pipeline_size ({virtual_pipeline_size}) = {parts} is "
            f"more than num_hidden_layers ({config.num_hidden_layers})",
            "choose a smaller virtual_pipeline_size",
        )

    def reckon() -> LayerCosts:
        costs = layer_seconds(config, lora, mesh.tp.size, torch.device(place.device), workload)
        if profile_file is None or workload is None:
            return costs
        return measured_costs(costs, read_profile(profile_file, config, workload.base_format))

    costs = on_first(reckon, mesh.world)  # ranks on unlike devices must not cut the model differently
    layers = stage_layers(config, parts, partition_method, custom_partition, costs)
    own, *further = layers[mesh.pp.rank :: mesh.pp.size]
    task = TASKS[lora.config.task_type]
    floor, fit = first_trained_part(config, lora, layers), None
    again: dict[str, Any] = {}
    if workload is not None:
        shape, stages = shape_of(config, lora, mesh.tp.size, torch.device(place.device).type), mesh.pp.size
        peak = SCHEDULES[schedule].peak(mesh.pp.rank, stages, fitting.microbatches, floor, virtual_pipeline_size)
        use = StageUse(shape, (own, *further), mesh.pp.is_first, mesh.pp.is_last, max(1, peak.activations), peak.inputs)
        fit = fitting.choose(use, workload)
        fit = replace(fit, work=of_all_stages(fit.work, use.layers, mesh.pp))
        again = {"recompute": fit.work.recompute, "tile": fit.work.tile, "offloaded": fit.work.offloaded}
    stage = Stage(
        config,
        own,
        place,
        lora,
        first=mesh.pp.is_first,
        last=mesh.pp.is_last,
        further=further,
        loss=task.loss,
        sums=task.sums,
        **again,
    )
    return stage, Cut(tuple(layers), floor, tuple(costs.shares(layers)), fit)


def first_trained_part(config: ModelSpec, lora: ResolvedLora, parts: Sequence[range]) -> int:
    """Return the first of `parts`, each a range of layers, that has something to train; their number where none has."""
    modules = [name.rpartition(".lora_")[0] or name.rpartition(".")[0] for name in trained_shapes(lora, config)]
    lowest = min((config.linears[name].layer for name in modules if name in config.linears), default=None)
    if lora.words(config.embedding.name).trains:
        lowest = 0
    elif lowest is None:  # a head, or nothing
        lowest = config.num_hidden_layers - bool(modules)
    return next((s for s, part in enumerate(parts) if lowest < part.stop), len(parts))


def largest_exchange(
    config: ModelSpec, lora: ResolvedLora, tp: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Return bytes that choose_exchange wants for microbatches of `tokens` tokens."""
    return exchange_bytes(shape_of(config, lora, tp, device.type), tokens, dtype.itemsize)


def layer_seconds(
    config: ModelSpec, lora: ResolvedLora, tp: int, device: torch.device, workload: Workload | None = None
) -> LayerCosts:
    """Return what each layer is reckoned to take on a tensor-parallel rank; without a workload its forward alone."""
    if workload is None:
        lora, workload = NO_LORA, Workload(rows=1, seq_length=256, labelled=1 / 256)
    return layer_costs(shape_of(config, lora, tp, device.type), workload, device_of(device))


def stage_layers(
    config: ModelSpec,
    stages: int,
    partition_method: str,
    custom_partition: tuple[int, ...] | None,
    costs: LayerCosts | None = None,
) -> list[range]:
    """Return the layers of each stage. Raises UserError where the model cannot be cut so.

    costs  for partition_method cost; None: those of the forward of the model alone
    """
    if partition_method == "cost":
        costs = costs or layer_seconds(config, NO_LORA, 1, torch.device("cpu"))
    return cut_layers(config, partition_method, stages, costs, custom_partition)


def check_vocabulary(largest: int, config: ModelSpec, model_path: str) -> None:
    """Raise UserError where the tokenizer gives an id that the model has no embedding for."""
    if largest >= config.vocab_size:
        raise UserError(
            f"model_path {model_path}: its tokenizer gives token id {largest}, but the model's vocab_size "
            f"({config.vocab_size}) ends before",
            "take tokenizer and model from one folder, or resize the embedding",
        )


def settle_head(config: ModelSpec, folder: str | Path) -> tuple[ModelSpec, str | None]:
    """Return the spec with the head that the weights in `folder` have, and a line for the user where it is another.

    A config may tie the head to the embedding although the files hold a head of its own: as transformers, it is used.
    Raises UserError as `open_base`. For one rank: it may read both matrices.
    """
    if not isinstance(config.head, Head) or not config.head.tied or not has_own_head(folder, base_names(config)):
        return config, None
    note = (
        f"{folder}: config.json says tie_word_embeddings, but {config.head.weight} in the files is not "
        f"{config.embedding.weight}: the head of the files is used"
    )
    return replace(config, head=replace(config.head, tied=False)), note


def load_base_weights(stage: Stage, folder: str | Path) -> tuple[str, ...]:
    """Fill the frozen weights of the stage, by slice; return lines to be told, and raise as `load_base`."""
    notes = load_base(stage, folder, splits=named_splits(stage), names=base_names(stage.config))
    groups = (group for group in stage.groups if isinstance(group, LinearGroup))
    return (*notes, *decoded_note((group.matrix, [linear.name for linear in group.linears]) for group in groups))


def base_names(config: ModelSpec) -> BaseNames:
    """Return the names and shapes that the files of a model's base weights must have."""
    words = None if config.stored_words is None else config.vocab_size
    stored = config if config.stored_words is None else config.with_words(config.stored_words)
    embedding, head = config.embedding.weight, config.head
    if isinstance(head, ClassHead):
        weight, tied, optional = "", False, frozenset(head.trained)
    else:
        weight, tied, optional = head.weight, head.tied, head.optional
    more = words, config.stacks, config.joins
    return BaseNames(stored.tensors, embedding, weight, tied, config.files, optional, *more)


def trained_shapes(lora: ResolvedLora, config: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every trainable parameter of the whole model, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (linear, _) in config.linears.items():
        if lora.trains_bias(name) and linear.bias:
            shapes[f"{name}.bias"] = (linear.out_features,)
        if (adapter := lora.adapter(name)) is not None:
            keys = factor_keys(name, lora.config.expert_lora)
            shapes |= {keys[0]: (adapter.r, linear.in_features), keys[1]: (linear.out_features, adapter.r)}
            if adapter.bias:
                shapes[f"{name}.lora_B.bias"] = (linear.out_features,)
            if adapter.dora:
                shapes[f"{name}.{MAGNITUDE}"] = (linear.out_features,)
    shapes |= lora.words(config.embedding.name).shapes(
        config.embedding.name, False, config.vocab_size, config.embedding.width
    )
    if isinstance(config.head, ClassHead):
        return shapes | dict(config.head.trained)
    head = config.head.name
    return shapes | lora.words(head).shapes(head, True, config.vocab_size, config.embedding.width)


def check_adapter(
    tensors: Mapping[str, torch.Tensor], lora: ResolvedLora, config: ModelSpec, where: str | Path
) -> None:
    """Raise UserError, the same on every rank, where names or shapes of an adapter are not those of this model."""
    expected = trained_shapes(lora, config)
    missing, left_over = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    dense = config.head.dense if isinstance(config.head, ClassHead) else None
    if missing and dense is not None and all(name.startswith(f"{dense.name}.") for name in missing):
        part, said = dense.name.partition(".")[0], "peft saves it only where modules_to_save names it"
        raise UserError(
            f"adapter {where}: lacks {dense.name}, which the classifier reads: {said}",
            f'train it again with modules_to_save: ["{part}"]',
        )
    if missing or left_over:
        name = (missing or left_over)[0]
        what = "lacks" if missing else "has, but the model does not,"
        raise UserError(
            f"adapter {where}: {what} {name} ({len(missing)} missing, {len(left_over)} left over): it was trained on "
            "another model or with another lora_config",
            "name the right one",
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"adapter {where}: {name} has shape {list(tensors[name].shape)}, this model needs {list(shape)}: it "
                "was trained on another model",
                "name the right one",
            )


@torch.no_grad()
def load_adapter(stage: Stage, tensors: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Fill the adapters of the stage with their slices of the whole `tensors`. Raises UserError as `check_adapter`."""
    check_adapter(tensors, stage.lora, stage.config, where)
    splits = named_splits(stage)
    for name, parameter in stage.trainable().items():
        parameter.copy_(splits[name].slice(tensors[name]))


# ---- the engine ----


@dataclass(frozen=True)
class EngineSettings:
    """How a model is cut, run and optimized.

    workload        a microbatch: rows, seq_length and how it is computed
    partition_method, custom_partition, uneven_heads, profile_file  as `build_stage` takes them
    schedule        one of SCHEDULES
    chunks          of a stage (virtual_pipeline_size)
    lanes           as `Neighbours` takes it
    learning_rate   a function of the step, counted from 0
    max_grad_norm   0: gradients are not clipped
    seed            of the dropout masks
    optimizer       arguments of AdapterOptimizer; None: its defaults
    cuda_graphs     None: wherever they serve
    timed           whether the communication inside layers is timed, which excludes graphs over tensor parallelism
    fitting         what of the workload's layers is computed again
    """

    workload: Workload
    learning_rate: Callable[[int], float]
    partition_method: str = "uniform"
    custom_partition: tuple[int, ...] | None = None
    uneven_heads: bool = False
    profile_file: str | None = None
    schedule: str = "1f1b"
    chunks: int = 1
    lanes: bool | None = None
    max_grad_norm: float = 1.0
    seed: int = 0
    optimizer: Mapping[str, Any] | None = None
    cuda_graphs: bool | None = None
    timed: bool = False
    fitting: Fitting = AS_GIVEN

    @property
    def of_stage(self) -> dict[str, Any]:
        """The arguments of `build_stage`."""
        return {
            "partition_method": self.partition_method,
            "custom_partition": self.custom_partition,
            "virtual_pipeline_size": self.chunks,
            "uneven_heads": self.uneven_heads,
            "workload": self.workload,
            "profile_file": self.profile_file,
            "schedule": self.schedule,
            "fitting": self.fitting,
        }


@dataclass(frozen=True)
class Engine:
    """What trains the adapters of this rank. notes: lines for the user. Use `close` of the trainer at the end."""

    trainer: Trainer
    stage: Stage
    cut: Cut
    parameters: Mapping[str, nn.Parameter]
    splits: Mapping[str, Split]
    notes: tuple[str, ...]


def build_trainer(
    config: ModelSpec,
    mesh: ParallelMesh,
    lora: ResolvedLora,
    place: Placement,
    settings: EngineSettings,
    fill: Callable[[Stage], None],
    *,
    clock: Clock | None = None,
    watch: Callable[[Action], contextlib.AbstractContextManager] | None = None,
) -> Engine:
    """Build stage, runner, gradients, optimizer and trainer of this rank. Collective.

    fill   gives the stage its weights: those of the base and the adapters
    clock  times the phases; watch: a context in which each compute runs
    Raises UserError, on every rank, where the model cannot be cut or run so.
    """
    device, work = torch.device(place.device), settings.workload
    with together(mesh.world):
        stage, cut = build_stage(config, mesh, lora, place, **settings.of_stage)
    with together(mesh.world):
        fill(stage)
    stage.settle()
    with together(mesh.world):
        how: dict[str, Any] = {"timed": settings.timed, "offloads": stage.offloads, "trains_words": stage.trains_words}
        how["tokens"] = work.tokens
        graphs, note = choose_graphs(settings.cuda_graphs, place, mesh, **layer_facts(config, place), **how)
    if graphs:
        stage.use_graphs()
    parameters, splits = stage.trainable(), named_splits(stage)
    clock = clock or (lambda phase: contextlib.nullcontext())
    tokens = work.sent // (mesh.tp.size if place.sequence_parallel else 1)
    shape, ring = (tokens, config.hidden_size), settings.chunks > 1
    runner = PipelineRunner(
        stage,
        Neighbours(mesh, shape, place.dtype, device, ring=ring, lanes=settings.lanes),
        SCHEDULES[settings.schedule],
        cut.floor,
        device=device,
        chunks=settings.chunks,
        clock=clock,
        watch=watch,
    )
    with together(mesh.world):
        optimizer = AdapterOptimizer(parameters, **(settings.optimizer or {}))
    trainer = Trainer(
        stage,
        mesh,
        runner,
        FlatGradients(parameters, splits, mesh, device),
        optimizer,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        loss_scale=LossScale(place.dtype == torch.float16),
        clock=clock,
    )
    return Engine(trainer, stage, cut, parameters, splits, (note,) if note else ())
