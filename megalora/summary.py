"""What a run tells of itself at its start: the table, and notes on what is not as one might expect."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megalora.adapters.config import ResolvedLora
from megalora.building import Cut, Engine, trained_shapes
from megalora.choices import CLASSIFICATION
from megalora.data import Loader, PackedRows
from megalora.flags import FinetuneArguments, TrainArguments
from megalora.models.dropouts import base_dropouts, told
from megalora.models.spec import (
    Attention,
    ClassHead,
    CrossAttention,
    Head,
    LatentAttention,
    ModelSpec,
    RecurrentMixer,
    mixers_of,
)
from megalora.models.stage import Stage
from megalora.monitor import keys_seen, lora_flops_per_token
from megalora.ops import extension
from megalora.parallel.collectives import gather_objects
from megalora.parallel.mesh import ParallelMesh
from megalora.pipeline.schedule import SCHEDULES
from megalora.planning.devices import device_of
from megalora.planning.layouts import predicted
from megalora.planning.nodes import Workload
from megalora.planning.plans import Layout
from megalora.starting import Beginning


def start_up_table(
    arguments: FinetuneArguments, begun: Beginning, engine: Engine, work: Workload, mesh: ParallelMesh
) -> dict[str, dict[str, Any]]:
    """Return {section: {name: value}} of a run. Collective: memory is that of the fullest rank."""
    rows, template = begun.loader.rows, begun.template
    return {
        "model": _model(arguments.model.model_path, begun.config, begun.lora),
        "layout": _layout(arguments, begun, engine, work, mesh),
        "data": {
            "rows": f"{_documents_in_rows(rows)} of {rows.seq_length} tokens",
            "tokens": f"{rows.tokens:,}, {rows.labelled_tokens:,} of them labelled",
            "task" if begun.config.labels else "template": f"{template.description} ({template.identity()})",
            "evaluation": _evaluation_rows(begun.evaluations),
        },
        "training": _training(arguments.train, begun),
    }


_TRIED = {**dict.fromkeys(CLASSIFICATION, "a text to label"), "SEQ_2_SEQ_LM": "a text"}  # prompts, by task


def generate_command(arguments: FinetuneArguments, mesh: ParallelMesh, task: str, images: bool = False) -> str:
    """Return the command line that tries the adapter of a run: a chat, the label of a text or what it becomes.

    images  its model reads one before each text
    """
    model, processes = arguments.model, mesh.tp.size * mesh.pp.size
    given = {
        "model_path": model.model_path,
        "resume_peft_from_checkpoint": arguments.train.output_dir,
        "resume_from_checkpoint": model.resume_from_checkpoint,
        "base_format": None if model.base_format == "auto" else model.base_format,
        "nproc": processes if processes > 1 else None,
        "tensor_parallel_size": mesh.tp.size if mesh.tp.size > 1 else None,
        "pipeline_parallel_size": mesh.pp.size if mesh.pp.size > 1 else None,
        "uneven_heads": "true" if arguments.parallel.uneven_heads else None,
        "prompt": "a text" if images else _TRIED.get(task),
        "image": "image.png" if images else None,
    }
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["megalora", "generate", *words])


def forecast(arguments: FinetuneArguments, begun: Beginning, engine: Engine, work: Workload, mesh: ParallelMesh) -> str:
    """Return a line on the steps that a run would make: their learning rates, and the time that the plan gives them."""
    train, first, total = arguments.train, begun.first_step, begun.total_steps
    if first >= total:
        return f"nothing to do: the run is complete at step {first}"
    where = torch.device(engine.stage.place.device)
    seconds = predicted(
        begun.config, begun.lora, layout_of(arguments, work, engine.stage, mesh), engine.cut.layers, where
    ).seconds
    steps = sorted({first, min(total - 1, max(first, train.warmup(total))), (first + total) // 2, total - 1})
    rates = ", ".join(f"{train.learning_rate_at(step, total):.3g} at step {step + 1}" for step in steps)
    time = datetime.timedelta(seconds=round(seconds * (total - first)))
    return (
        f"dry run: {total - first:,} steps of {seconds:.3g} s, {time} in all by the plan for {device_of(where).name}; "
        f"learning rate {rates}; nothing was trained or written: without --dry_run the same command trains"
    )


def layout_of(arguments: FinetuneArguments, work: Workload, stage: Stage, mesh: ParallelMesh) -> Layout:
    """Return the layout of a run, as the planner takes it."""
    return Layout(
        mesh.tp.size,
        mesh.pp.size,
        mesh.replicas.size,
        arguments.parallel.schedule,
        arguments.parallel.virtual_pipeline_size,
        arguments.train.gradient_accumulation_steps,
        work,
        cuda_graphs=stage.uses_graphs,
        tp_comm_overlap=stage.place.exchange is not None,
    )


def drawn_layout(schedule: str, cut: Cut, mesh: ParallelMesh) -> dict[str, Any]:
    """Return how a run is divided over its processes, for JSON: the sizes of the mesh, and of each pipeline stage its
    layers [first, last], chunk by chunk, and its share of the compute."""
    stages = mesh.pp.size
    return {
        "tensor": mesh.tp.size,
        "pipeline": stages,
        "context": mesh.cp.size,
        "data": mesh.dp.size,
        "schedule": schedule if stages > 1 else "",
        "stages": [
            {
                "layers": [[part[0], part[-1]] for part in cut.layers[number::stages]],
                "share": round(sum(cut.shares[number::stages]), 4),
            }
            for number in range(stages)
        ],
    }


def _evaluation_rows(sets: Mapping[str, Loader]) -> str:
    told = [f"{f'{name}: ' if name else ''}{_documents_in_rows(loader.rows)}" for name, loader in sets.items()]
    return "; ".join(told) or "none"


def _documents_in_rows(rows: PackedRows) -> str:
    return f"{_counted(rows.documents, 'document')} in {_counted(rows.rows, 'row')}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _training(train: TrainArguments, begun: Beginning) -> dict[str, str]:
    loader, total_steps = begun.loader, begun.total_steps
    warmup, each = train.warmup(total_steps), loader.steps_per_epoch
    rise = f" after {_counted(warmup, 'step')} of warmup" if warmup else ""
    return {
        "steps": f"{total_steps:,} of {_counted(loader.global_batch_rows, 'row')} each: "
        f"{total_steps / each:.4g} epochs of {_counted(each, 'step')}",
        "learning rate": f"{train.learning_rate:g}, {train.lr_scheduler_type}{rise}",
    }


def _model(path: str, config: ModelSpec, lora: ResolvedLora) -> dict[str, str]:
    shapes = config.tensors
    trained = config.head.trained if isinstance(config.head, ClassHead) else {}
    frozen = sum(math.prod(shape) for name, shape in shapes.items() if name not in trained)
    trainable = sum(map(math.prod, trained_shapes(lora, config).values()))
    targets = sorted({name.rsplit(".", 1)[-1] for name in lora.adapters})
    return {
        "path": path,
        "type": f"{config.model_type}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
        "parameters": f"{frozen:,} frozen, {trainable:,} trained ({100 * trainable / frozen:.3f}%)",
        "adapters": f"{len(lora.adapters)} linears ({', '.join(targets)}), r {lora.config.r}, "
        f"alpha {lora.config.lora_alpha:g}, dropout {lora.config.lora_dropout:g}{', DoRA' * lora.config.use_dora}",
        **({"dropout of the base": told(dropouts)} if (dropouts := base_dropouts(config)) else {}),
        **_words(lora),
    }


def _words(lora: ResolvedLora) -> dict[str, str]:
    """Return what is trained of the embedding and the head beside adapters."""
    found = [f"all of {name}" for name in sorted(lora.saved)]
    found += [f"{len(ids)} tokens of {name}" for name, ids in lora.tokens.items()]
    return {"trained in full": ", ".join(found)} if found else {}


def _layout(
    arguments: FinetuneArguments, begun: Beginning, engine: Engine, work: Workload, mesh: ParallelMesh
) -> dict[str, str]:
    parallel, microbatches = arguments.parallel, arguments.train.gradient_accumulation_steps
    stage, cut, place = engine.stage, engine.cut, engine.stage.place
    stored = sum(p.numel() * p.element_size() for p in stage.parameters())
    if place.base.name != "dense":
        stored += sum(group.matrix.nbytes for group in stage.groups)
    trained = sum(p.numel() * p.element_size() for p in engine.parameters.values())
    memory = max(gather_objects(stored + 3 * trained, mesh.world))  # gradient and two moments beside the masters
    recompute = _recomputed(parallel.recompute, cut)
    sequence = ", sequence parallel" if parallel.sequence_parallel else ""
    sequence += ", TP communication overlapped" if place.exchange is not None else ""
    waiting = ""
    if mesh.pp.size > 1:
        share = SCHEDULES[parallel.schedule].waiting(mesh.pp.size, microbatches, cut.floor, cut.shares)
        waiting = f", stages wait {share:.0%} of the time"
    where = torch.device(place.device)
    plan = predicted(begun.config, begun.lora, layout_of(arguments, work, stage, mesh), cut.layers, where)
    device = where.type
    return {
        "processes": f"{mesh.world_size} = tensor {mesh.tp.size} x pipeline {mesh.pp.size} x "
        f"{f'context {mesh.cp.size} x ' if mesh.cp.size > 1 else ''}data {mesh.dp.size}{sequence}",
        **(
            {f"stage {number}": _stage(number, cut, mesh.pp.size) for number in range(mesh.pp.size)}
            if mesh.pp.size > 1
            else {}
        ),
        "schedule": (f"{parallel.schedule}, " if mesh.pp.size > 1 else "")
        + f"{microbatches} microbatch{'es' * (microbatches > 1)} a step{recompute}{waiting}",
        "device": f"{device}, {begun.compute}, "
        f"{'' if place.base.name == 'dense' else f'base in {place.base.name}, '}"
        f"{'compiled' if extension.has_kernels(device) else 'plain torch'} ops"
        f"{', CUDA graphs' if stage.uses_graphs else ''}",
        "memory": f"{memory / 2**30:.2f} GiB of weights and optimizer on the fullest rank, "
        f"{plan.memory / 2**30:.2f} GiB at the peak of a step by the plan",
    }


def _recomputed(method: str, cut: Cut) -> str:
    """Return what is recomputed of the layers, such as ", recompute auto: 20 mlp, 12 norms"."""
    work = cut.fit.work
    if method == "none" or work.recompute == "none":
        return ""
    layers = range(cut.layers[0].start, cut.layers[-1].stop)
    if isinstance(work.recompute, str):
        return f", recompute {method}"
    if all(work.level(i) == "none" for i in layers):
        return ""
    host = f"; {cut.fit.host / 2**30:.1f} GiB in host memory" if work.offloaded else ""
    return f", recompute {method}: {cut.fit.words(layers)}{host}"


def _stage(number: int, cut: Cut, stages: int) -> str:
    parts = " and ".join(f"{part[0]} to {part[-1]}" for part in cut.layers[number::stages])
    return (
        f"layers {parts}"
        + (", embedding" if number == 0 else "")
        + (", head" if number == stages - 1 else "")
        + f", {sum(cut.shares[number::stages]):.1%} of the compute"
        + (", no backward" if number + len(cut.layers) - stages < cut.floor else "")
    )


def not_sequence_parallel(tokens: int, tp: int) -> str:
    """Return the note on a run over tensor parallelism without sequence parallelism."""
    why = f"{tokens} tokens of a microbatch are not a multiple of {tp}" if tokens % tp else "as asked"
    return f"tensor-parallel ranks hold all activations between layers: {why}"


@dataclass(frozen=True)
class Contexts:
    """Keys that a token attends to on average, without windows. of_targets: of its document up to it; of_sources: a
    source's token of its whole document; of_memory: a target's token of its source. None where there are no sources.

    sources  tokens of all sources
    """

    of_targets: float
    of_sources: float | None = None
    of_memory: float | None = None
    sources: int = 0


def contexts(rows: PackedRows) -> Contexts:
    """Return how far the tokens of the rows see."""
    if rows.sides is None:
        return Contexts(keys_seen(rows.lengths))
    sources, targets = rows.sides.lengths(rows.source)[rows.members].T
    of_memory = float((sources * targets).sum() / max(1, targets.sum()))
    return Contexts(keys_seen(targets), keys_seen(sources, causal=False), of_memory, int(sources.sum()))


def flops_per_token(config: ModelSpec, lora: ResolvedLora, rows: PackedRows) -> float:
    """Return what training on a token of these rows costs (see `monitor.flops`); of experts, those that are chosen.

    Of an encoder-decoder each linear counts for the tokens that go through it.
    """
    shares = {**config.shares, **_shares_of_sides(config, contexts(rows).sources / max(1, rows.tokens))}
    frozen = sum(
        linear.in_features * linear.out_features * shares.get(name, 1.0) for name, (linear, _) in config.linears.items()
    )
    if isinstance(config.head, Head):
        frozen += config.vocab_size * config.embedding.width * shares.get("head", 1.0)  # tied or not
    mixers = (mixer for layer in config.stack.layers for mixer in mixers_of(layer))
    return lora_flops_per_token(
        frozen_matmul_parameters=frozen,
        lora_parameters=sum(size * shares.get(linear, 1.0) for linear, size in _lora_parameters(config, lora).items()),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        context=_keys_of_a_layer(config, rows),
        recurrence=sum(mixer.step_flops for mixer in mixers if isinstance(mixer, RecurrentMixer)),
    )


def _keys_of_a_layer(config: ModelSpec, rows: PackedRows) -> float:
    """Return keys that a token of the rows attends to on average in a layer; of an encoder-decoder each layer's tokens
    count as their share of all.
    """
    sources = targets = rows.lengths
    if rows.sides is not None:
        sources, targets = rows.sides.lengths(rows.source)[rows.members].T
    pairs: dict[tuple, float] = {}  # of each kind of attention
    total = 0.0
    for index, layer in enumerate(config.stack.layers):
        encodes = config.encoder is not None and index < config.encoder.count
        for mixer in mixers_of(layer):
            if isinstance(mixer, Attention):
                kind: tuple = (encodes, mixer.window, mixer.chunk, mixer.causal)
            elif isinstance(mixer, LatentAttention):
                kind = (encodes, None, None, True)
            elif isinstance(mixer, CrossAttention):
                kind = ()
            else:
                continue
            if kind not in pairs:
                lengths = sources if encodes else targets
                seen = keys_seen(lengths, *kind[1:]) * int(lengths.sum()) if kind else int((sources * targets).sum())
                pairs[kind] = seen
            total += pairs[kind]
    return total / max(1, rows.tokens) / config.num_hidden_layers


def _shares_of_sides(config: ModelSpec, sources: float) -> dict[str, float]:
    """Return the share of all tokens that goes through each linear of an encoder-decoder, and through its head.

    sources  share of all tokens that are the encoder's
    """
    if config.encoder is None:
        return {}
    keys = {
        config.stack.of_layer(index, linear.name)
        for index, layer in enumerate(config.stack.layers)
        for mixer in mixers_of(layer)
        if isinstance(mixer, CrossAttention)
        for linear in (mixer.k, mixer.v)
    }
    shares = {
        name: sources if placed.layer < config.encoder.count or name in keys else 1 - sources
        for name, placed in config.linears.items()
    }
    return shares | {"head": 1 - sources}


def _lora_parameters(config: ModelSpec, lora: ResolvedLora) -> dict[str, int]:
    """Return the elements of A and B by linear; those of an embedding are looked up, as it is itself."""
    found: dict[str, int] = {}
    for name, shape in trained_shapes(lora, config).items():
        linear, dot, factor = name.partition(".lora_")
        if dot and factor in ("A.weight", "B.weight"):
            found[linear] = found.get(linear, 0) + math.prod(shape)
    return found
