"""Generation, top to bottom: questions, model, adapter, replies.

    python tools/generate.py --model_path DIR --resume_peft_from_checkpoint out --prompt "Who are you?"
    torchrun --nproc_per_node 4 tools/generate.py --model_path DIR --prompts_file prompts.txt \
        --output_file replies.jsonl --tensor_parallel_size 2 --pipeline_parallel_size 2

Text is read, rendered and shown by rank 0 alone; the other ranks see token ids.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from megalora.arguments import GenerateArguments, GenerationArguments
from megalora.building import build_stage, load_adapter, load_base_weights, resolve_dtype, resolve_lora
from megalora.checkpoint.adapter import open_adapter
from megalora.checkpoint.shards import AdapterCheckpoint
from megalora.data import ChatTemplate, load_tokenizer
from megalora.errors import UserError
from megalora.generation.dialogue import Chat, dialogue
from megalora.generation.prompts import Question, ask, decode, encode, read_questions, stop_token_ids
from megalora.generation.replica import Prompt, Replica, Reply
from megalora.generation.sampling import Sampling
from megalora.identity import base_identity, check_base
from megalora.lora import LoraConfig, ResolvedLora
from megalora.models.config import ModelConfig, check_layout, read_config
from megalora.models.stage import NO_LORA
from megalora.parallel.collectives import broadcast_object, gather_objects, on_first, together
from megalora.parallel.launch import choose_device, distributed
from megalora.parallel.linear import Placement
from megalora.parallel.mesh import ParallelMesh

ROUND = 128  # prompts of one replica between two writes of replies: no replica waits longer for the others


def generate(arguments: GenerateArguments) -> None:
    """Runs `arguments` on this process of the mesh. Raises UserError, on every rank, for what the user can mend."""
    model, parallel, options = arguments.model, arguments.parallel, arguments.generation
    device, remark = choose_device()
    with distributed(device, parallel.tensor_parallel_size, parallel.pipeline_parallel_size) as mesh:
        world = mesh.world

        # What is asked: the questions of the command line or of a file, or a dialogue (None).
        questions = template = output = asked = None
        with together(world):
            config = read_config(model.model_path)
            check_layout(config, mesh.tp.size, mesh.pp.size, parallel.uneven_heads)
            context = _context(config, options)
            if world.is_first:
                template = ChatTemplate(load_tokenizer(model.model_path), options.template)
                stop = stop_token_ids(model.model_path, template)
                questions = _questions(options)
                token_ids = questions and [encode(template, question, context) for question in questions]
                output = _Output(options)
                asked = (token_ids, stop)
        token_ids, stop = broadcast_object(asked, world)

        # Who answers: the model's shape, its adapter, this rank's part of both.
        adapter = _adapter(arguments, config, template, mesh)
        with together(world):
            lora = NO_LORA if adapter is None else _resolved(adapter, config)
            dtype = resolve_dtype(model.dtype, device)
            place = Placement(mesh.tp, sequence_parallel=False, dtype=dtype, device=device)
            stage, _ = build_stage(
                config,
                mesh,
                lora,
                place,
                partition_method=parallel.partition_method,
                custom_partition=parallel.custom_partition,
                uneven_heads=parallel.uneven_heads,
            )
        with together(world):
            load_base_weights(stage, model.resume_from_checkpoint or model.model_path)
            if adapter is not None:
                load_adapter(stage, adapter.tensors, adapter.where)
        sampling = Sampling(options.temperature, options.top_k, options.top_p, seed=options.seed)
        replica = Replica(stage, mesh.pp, mesh.tp, context, sampling, stop)
        if world.is_first:
            _say_notes(remark, adapter, token_ids, mesh)

        # The replies.
        if token_ids is None:
            chat = Chat(template, options.system, context, sys.stdin.fileno()) if world.is_first else None
            dialogue(world, chat, lambda prompt: _shared_out([prompt], replica, mesh, options.max_new_tokens)[0])
            return
        prompts = [Prompt(number, ids) for number, ids in enumerate(token_ids)]
        for first in range(0, len(prompts), ROUND * mesh.dp.size):
            part = slice(first, first + ROUND * mesh.dp.size)
            replies = _shared_out(prompts[part], replica, mesh, options.max_new_tokens)
            with together(world):
                if world.is_first:
                    output.write(questions[part], replies, template)
        with together(world):
            if world.is_first:
                output.finish()


def _shared_out(prompts: Sequence[Prompt], replica: Replica, mesh: ParallelMesh, max_new_tokens: int) -> list[Reply]:
    """The reply to each prompt, in order: the replicas of the dp axis take turns. Collective over the world."""
    dp = mesh.dp
    with together(mesh.world):
        mine = replica.replies(prompts[dp.rank :: dp.size], max_new_tokens)
    parts = gather_objects(mine, dp)
    return [parts[i % dp.size][i // dp.size] for i in range(len(prompts))]


# ---- what is asked ----


def _context(config: ModelConfig, options: GenerationArguments) -> int:
    """Longest prompt and reply together, in tokens."""
    longest = config.max_position_embeddings
    if options.seq_length is not None and options.seq_length > longest:
        raise UserError(
            f"seq_length ({options.seq_length}) is more than the model's max_position_embeddings ({longest}): choose "
            f"at most that"
        )
    return options.seq_length or longest


def _questions(options: GenerationArguments) -> list[Question] | None:
    if options.prompt is not None:
        return [ask(options.prompt, options.system, "prompt")]
    if options.prompts_file is not None:
        return read_questions(options.prompts_file, options.system)
    return None


# ---- who answers ----


def _adapter(
    arguments: GenerateArguments, config: ModelConfig, template: ChatTemplate | None, mesh: ParallelMesh
) -> AdapterCheckpoint | None:
    """The adapter that is asked for, without what only training needs of it. Collective; rank 0 has the template."""
    model, path = arguments.model, arguments.model.resume_peft_from_checkpoint
    if path is None or arguments.generation.disable_adapter:
        return None

    def read() -> AdapterCheckpoint:
        adapter = open_adapter(path)
        check_base(adapter, base_identity(config, model.resume_from_checkpoint or model.model_path, template))
        return replace(adapter, optimizer=None, trainer=None)

    return on_first(read, mesh.world)


def _resolved(adapter: AdapterCheckpoint, config: ModelConfig) -> ResolvedLora:
    lora_config = LoraConfig.from_dict(adapter.lora_config, adapter.where)
    try:
        return resolve_lora(lora_config, config)
    except UserError as error:
        raise UserError(f"adapter {adapter.where}: is of another model ({error})") from None


# ---- what is shown: replies on standard output or in a file, all else on standard error ----


class _Output:
    """Rank 0's replies. A file is written aside and takes its name when all of them are in it.

    Raises UserError where it cannot be written: as far as that can be told, before there is anything to write.
    """

    def __init__(self, options: GenerationArguments):
        self._path = None if options.output_file is None else Path(options.output_file)
        self._names_prompts = options.prompts_file is not None
        self._file: TextIO | None = None
        if self._path is not None:
            with self._told():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                if self._path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "it is a folder")
                if not os.access(self._path.parent, os.W_OK):
                    raise PermissionError(errno.EACCES, "its folder is read-only")

    def write(self, questions: Sequence[Question], replies: Sequence[Reply], template: ChatTemplate) -> None:
        for question, reply in zip(questions, replies, strict=True):
            text = decode(template, reply.token_ids)
            if self._path is None:
                print(f"> {question.text}\n{text}\n" if self._names_prompts else text, flush=True)
                continue
            row = {"prompt": question.text, "response": text, "finish_reason": reply.finish_reason}
            with self._told():
                if self._file is None:
                    self._file = self._aside.open("w", encoding="utf-8")
                print(json.dumps(row, ensure_ascii=False), file=self._file, flush=True)

    def finish(self) -> None:
        if self._file is not None:
            with self._told():
                self._file.close()
                self._aside.replace(self._path)

    @property
    def _aside(self) -> Path:
        return self._path.with_name(self._path.name + ".partial")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"output_file {self._path}: cannot be written ({error.strerror}): free space or name another file"
            ) from None


def _say_notes(
    remark: str | None, adapter: AdapterCheckpoint | None, token_ids: Sequence | None, mesh: ParallelMesh
) -> None:
    notes = [remark] if remark else []
    notes += adapter.notes if adapter is not None else ()
    at_a_time = 1 if token_ids is None else len(token_ids)
    if at_a_time < mesh.dp.size:
        notes.append(
            f"{mesh.dp.size - at_a_time} of {mesh.dp.size} copies of the model have nothing to do: start "
            f"{mesh.tp.size * mesh.pp.size * at_a_time} processes"
        )
    for note in notes:
        print(f"megalora: {note}", file=sys.stderr, flush=True)
