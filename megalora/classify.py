"""Prediction with a classifier's adapter: texts in, labels with their probability out, as JSON lines.

    python tools/generate.py --model_path DIR --resume_peft_from_checkpoint out --prompt "Ada lives in Rome."
    torchrun --nproc_per_node 4 tools/generate.py --model_path DIR --resume_peft_from_checkpoint out \\
        --prompts_file texts.jsonl --output_file labels.jsonl --tensor_parallel_size 2 --pipeline_parallel_size 2

This is what `megalora generate` does where the adapter is one of TOKEN_CLS or SEQ_CLS. A file has rows as for training
(their labels are not read), or one text a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalora.adapters.config import LoraConfig
from megalora.building import (
    build_stage,
    load_adapter,
    load_base_weights,
    resolve_base,
    resolve_lora,
)
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.compute_dtype import choose_dtype
from megalora.data import build_rows, pack, read_rows
from megalora.data.classes import ClassRows
from megalora.data.encode import EncodeSettings
from megalora.data.labelled import LabelledText, TaggedWords
from megalora.data.loader import Loader
from megalora.data.pieces import IGNORE, Sample
from megalora.data.readers import READERS
from megalora.data.tokenizer import open_tokenizer
from megalora.errors import UserError
from megalora.files import read_text, write_file
from megalora.flags import GenerateArguments, GenerationArguments
from megalora.identity import adapter_labels, base_identity, check_base, other_base
from megalora.models.config import check_layout, check_length, check_task, read_config
from megalora.models.inputs import Inputs, training_inputs
from megalora.models.spec import ModelSpec
from megalora.models.stage import Stage
from megalora.parallel.collectives import all_reduce, broadcast_object, gather_objects, on_first, tell_once, together
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement
from megalora.pipeline.p2p import Neighbours
from megalora.pipeline.runner import PipelineRunner
from megalora.pipeline.schedule import SCHEDULES
from megalora.tasks.entities import are_entity_tags, entities
from megalora.vocabulary import adapter_tokens, with_rows_for

_ROW = 512  # tokens of a packed row, where no text is longer
_READ = {"prompt", "prompts_file", "output_file", "seq_length", "text_generation", "logits_dir"}  # flags that it reads


@dataclass(frozen=True)
class _Asked:
    """What is to be classified. rows: on rank 0 alone."""

    rows: list[TaggedWords | LabelledText]
    samples: list[Sample]
    longest: int


def classify(
    arguments: GenerateArguments, adapter: AdapterCheckpoint, mesh: ParallelMesh, device: torch.device
) -> None:
    """Classify what `arguments` name. Collective. Raises UserError, on every rank, for what the user can fix."""
    model, parallel = arguments.model, arguments.parallel
    with together(mesh.world):
        _check_flags(arguments.generation)
        lora_config = LoraConfig.from_dict(adapter.lora_config, adapter.where, trained=True)
        labels, task = _labels(adapter), lora_config.task_type
        config = read_config(model.model_path)
        check_task(task, config, f"adapter {adapter.where}")
        config = config.for_task(task, labels)
        check_layout(config, mesh.tp.size, mesh.pp.size, parallel.uneven_heads)
        length = arguments.generation.seq_length
        longer = None if length is None else check_length(config, length)
    added = on_first(lambda: adapter_tokens(adapter, model.model_path), mesh.world)
    with together(mesh.world):
        config = with_rows_for(config, added, model.model_path, adapter.tensors)
        opened = open_tokenizer(model.model_path, added)
        rendering = ClassRows(opened, task, labels, last=config.causal, columns=config.columns)
    weights = model.resume_from_checkpoint or model.model_path
    on_first(lambda: check_base(adapter, base_identity(config, weights, opened.tokenizer)), mesh.world)
    asked = _asked(arguments.generation, rendering, config, mesh)
    dtype = choose_dtype(model.dtype, device, mesh.world).dtype
    with together(mesh.world):
        base = resolve_base(model.base_format, config)
        place = Placement(mesh.tp, False, dtype, device, base=base)
        if mesh.world.is_first:
            others = other_base(adapter, base.name, model.model_path)
            for note in (*([longer] if longer else []), *adapter.notes, *others):
                print(f"megalora: {note}", file=sys.stderr, flush=True)
        stage, _ = build_stage(
            config,
            mesh,
            resolve_lora(lora_config, config),
            place,
            partition_method=parallel.partition_method,
            custom_partition=parallel.custom_partition,
            uneven_heads=parallel.uneven_heads,
        )
    with together(mesh.world):
        notes = load_base_weights(stage, weights)
        load_adapter(stage, adapter.tensors, adapter.where)
        stage.refresh_adapters()
    tell_once(notes, mesh.world)
    probabilities = _probabilities(stage, asked, mesh)
    with together(mesh.world):
        if mesh.world.is_first:
            found = zip(asked.rows, probabilities, strict=True)
            _write([_told(row, scores, labels) for row, scores in found], arguments.generation.output_file)


# ---- what is asked ----


def _check_flags(options: GenerationArguments) -> None:
    for one in fields(options):
        if one.name not in _READ and getattr(options, one.name) != one.default:
            raise UserError(f"{one.name} has no effect on a classifier's adapter, which writes no text", "leave it out")
    if options.prompt is None and options.prompts_file is None:
        raise UserError("a classifier's adapter does not chat", "give prompt or prompts_file")


def _labels(adapter: AdapterCheckpoint) -> tuple[str, ...]:
    labels = adapter_labels(adapter)
    if not labels:
        raise UserError(
            f"adapter {adapter.where}: does not say what its labels are",
            "put a config.json with the id2label of its training beside it",
        )
    return labels


def _asked(options: GenerationArguments, rendering: ClassRows, config: ModelSpec, mesh: ParallelMesh) -> _Asked:
    """Read and tokenise on rank 0; every rank gets the tokens. Collective."""

    def read() -> tuple[list[Any], list[Sample]]:
        longest = options.seq_length or config.max_position_embeddings
        encoder = rendering.encoder(EncodeSettings(longest))
        found, samples = [], []
        for value, where in _values(options):
            row: Any = rendering.read(value, where, question=True)
            row = replace(row, tags=None) if isinstance(row, TaggedWords) else replace(row, label=None)
            sample = encoder.sample(row, where)
            if len(sample.input_ids) > longest:
                raise UserError(f"{where}: {len(sample.input_ids)} tokens are more than {longest}", "shorten it")
            found.append(row)
            samples.append(sample)
        return found, samples

    rows: list[Any] = []
    with together(mesh.world):
        if mesh.world.is_first:
            rows, samples = read()
    samples = broadcast_object(samples if mesh.world.is_first else None, mesh.world)
    return _Asked(rows, samples, max(len(sample.input_ids) for sample in samples))


def _values(options: GenerationArguments) -> list[tuple[Any, str]]:
    """Return the texts or rows, each with its name in a message."""
    if options.prompt is not None:
        return [(options.prompt, "prompt")]
    path = Path(options.prompts_file or "")
    if path.suffix.lower() in READERS:
        return [(row, f"{path} row {number}") for number, row in enumerate(read_rows(path))]
    lines = read_text(path, what="prompts_file").split("\n")
    found = [(line.strip(), f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"prompts_file {path} holds no text", "write one a line")
    return found


# ---- what the model says ----


def _always(inputs: Inputs) -> Callable[[int], object]:
    return lambda microbatch: inputs


def _measured(hidden: torch.Tensor, head: Any, inputs: Inputs) -> torch.Tensor:
    """Return the probabilities of the labelled tokens, [labelled, classes] float64 (see Stage's `sums`)."""
    return head(hidden, inputs).softmax(-1).double()


def _probabilities(stage: Stage, asked: _Asked, mesh: ParallelMesh) -> list[np.ndarray]:
    """Return, on rank 0, the probabilities [labelled tokens, classes] of each document. Collective.

    The replicas of the dp axis take turns at the packed rows.
    """
    place, classes = stage.place, len(stage.config.labels)
    lengths = [len(sample.input_ids) for sample in asked.samples]
    width = min(max(asked.longest, _ROW), sum(lengths))
    bins = pack(lengths, width)
    rows = build_rows(asked.samples, bins, width, int(asked.samples[0].input_ids[0]))
    loader = Loader(
        rows, micro_batch_rows=1, num_microbatches=1, dp_rank=mesh.dp.rank, dp_size=mesh.dp.size, seed=0, shuffle=False
    )
    stage.sums = _measured
    neighbours = Neighbours(mesh, (width, stage.config.hidden_size), place.dtype, place.device)
    runner = PipelineRunner(stage, neighbours, SCHEDULES["1f1b"], 0, device=place.device)
    mine: dict[int, np.ndarray] = {}  # by packed row
    for step in range(loader.steps_per_epoch):
        batch = loader.step(step).microbatches[0]
        inputs = replace(training_inputs(batch, stage.config, place, seed=None, step=0), measures=True)
        labelled = int((batch.labels != IGNORE).sum())
        scores = runner.evaluate(1, _always(inputs), (labelled, classes))
        mine[step * mesh.dp.size + mesh.dp.rank] = all_reduce(scores, mesh.pp).cpu().numpy()
    found: dict[int, np.ndarray] = {}
    for part in gather_objects(mine, mesh.dp):
        found |= part
    by_document: dict[int, np.ndarray] = {}
    for number, members in enumerate(bins):
        counts = [int((asked.samples[member].columns["classes"] != IGNORE).sum()) for member in members]
        cuts = list(accumulate(counts))[:-1]
        by_document |= dict(zip(members, np.split(found[number], cuts), strict=True))
    return [by_document[number] for number in range(len(asked.samples))]


def _told(row: TaggedWords | LabelledText, scores: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Return one line of the output."""
    best = scores.argmax(-1).tolist()
    if isinstance(row, LabelledText):
        texts = {"text": row.text} | ({} if row.second is None else {"text_pair": row.second})
        every = {label: round(float(score), 6) for label, score in zip(labels, scores[0], strict=True)}
        return texts | {"label": labels[best[0]], "score": every[labels[best[0]]], "scores": every}
    words, tags = [word.text for word in row.words], [labels[number] for number in best]
    likely = [round(float(scores[place, number]), 6) for place, number in enumerate(best)]
    told: dict[str, Any] = {"tokens": words, "tags": tags, "scores": likely}
    if are_entity_tags(labels):
        spans = sorted(entities(tags), key=lambda entity: entity.start)
        told["entities"] = [
            {
                "label": kind,
                "text": "".join(f" {w.text}" if w.spaced else w.text for w in row.words[start:stop]).strip(),
                "start": start,
                "end": stop,
                "score": min(likely[start:stop]),
            }
            for kind, start, stop in spans
        ]
    return told


def _write(rows: Sequence[dict[str, Any]], output_file: str | None) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output_file is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(output_file), text.encode())
    except OSError as error:
        raise UserError(
            f"output_file {output_file}: cannot be written ({error.strerror})", "free space, or name another file"
        ) from None
