"""Generation, top to bottom: questions, model, adapter, replies.

    python tools/generate.py --model_path DIR --resume_peft_from_checkpoint out --prompt "Who are you?"
    torchrun --nproc_per_node 4 tools/generate.py --model_path DIR --prompts_file prompts.txt \
        --output_file replies.jsonl --tensor_parallel_size 2 --pipeline_parallel_size 2

Text is read, rendered and shown by rank 0 alone; the other ranks see token ids.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megalora import image_prompts, sources
from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.asked import questions_of, sampling_of, special_tokens, template_of
from megalora.building import (
    base_names,
    build_stage,
    load_adapter,
    load_base_weights,
    resolve_base,
    resolve_lora,
    settle_head,
)
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.checkpoint.base.weights import unread_layers
from megalora.choices import CLASSIFICATION
from megalora.classify import classify
from megalora.cluster.launch import choose_device, distributed
from megalora.cluster.watch import Watch
from megalora.compute_dtype import choose_dtype
from megalora.data import ChatTemplate
from megalora.data.tokenizer import OpenedTokenizer, open_tokenizer
from megalora.errors import UserError
from megalora.flags import GenerateArguments, GenerationArguments
from megalora.generation.defaults import not_applied, sampling_defaults, unescaped
from megalora.generation.dialogue import NAMES, Chat, dialogue, edits_lines
from megalora.generation.later import Later
from megalora.generation.logits import LogitsFolder
from megalora.generation.output import Output
from megalora.generation.prompts import Question, encode, stop_token_ids, unseen_stops
from megalora.generation.replica import Replica
from megalora.generation.requests import Listener, Prompt, Reply
from megalora.generation.sampling import Sampling
from megalora.generation.terminal import Voice
from megalora.generation.text import Ear, Reader
from megalora.identity import (
    adapter_for,
    adapter_prefix,
    adapter_template,
    base_identity,
    check_base,
    other_base,
)
from megalora.models.config import check_layout, check_length, check_writes_text, read_config
from megalora.models.multimodal import unread_note
from megalora.models.spec import ModelSpec
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.collectives import broadcast_object, gather_objects, on_first, tell_once, together
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement
from megalora.pictures import Picture
from megalora.rows import pixel_reader, refuse_of_sources
from megalora.vocabulary import adapter_tokens, with_rows_for

ROUND = 512  # prompts of one replica between two exchanges of replies
# How long a replica waits for the others' replies, or for the person at the terminal: the watch finds ranks that die.
PATIENCE = datetime.timedelta(days=30)


def generate(arguments: GenerateArguments) -> None:
    """Run `arguments` on this process of the mesh. Raises UserError, on every rank, for what the user can fix."""
    parallel, options = arguments.parallel, arguments.generation
    device, remark = choose_device()
    watch = Watch(heartbeat_timeout=parallel.heartbeat_timeout)
    with distributed(device, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, watch, PATIENCE) as mesh:
        found = _adapter(arguments, mesh)
        if found is not None and found.lora_config.get("task_type") in CLASSIFICATION:
            classify(arguments, found, mesh, device)
            return
        opened = _open(arguments, found, mesh)
        adapter, recorded = _checked(arguments, opened, found, mesh)
        asked = _asked(arguments, opened, recorded, mesh)
        later = Later()
        stage = _stage(arguments, opened.config, adapter, mesh, device)
        with together(mesh.world):
            keep_logits = later.of(LogitsFolder(options.logits_dir).save) if options.return_logits else None
        replica = Replica(
            stage,
            mesh.pp,
            mesh.tp,
            opened.context,
            asked.sampling,
            asked.stop,
            listened_to=_is_streamed(options) or options.stop is not None,
            keep_logits=keep_logits, fp8_cache=options.kv_cache == "fp8",
        )  # fmt: skip
        if mesh.world.is_first:
            _say_notes([*([remark] if remark else []), *asked.notes], adapter, asked.token_ids, mesh)

        def shared_out(prompts: Sequence[Prompt], adapted: bool, listener: Listener | None) -> list[Reply]:
            replica.switch_adapter(adapted)
            return _shared_out(prompts, replica, mesh, options.max_new_tokens, listener, later)

        if asked.token_ids is None:
            _talk(arguments, opened, asked, mesh, shared_out)
        else:
            _reply(arguments, opened, asked, mesh, shared_out, later)


@dataclass(frozen=True)
class _Opened:
    """The model's shape, and its tokenizer where this rank reads replies.

    context            longest prompt and reply together, in tokens
    tokenizer, reader  on rank 0, and with --stop on the first rank of each replica
    stops              strings that end a reply
    notes              lines for the user
    first              what an encoder-decoder's decoder begins with
    """

    config: ModelSpec
    context: int
    tokenizer: OpenedTokenizer | None
    reader: Reader | None
    stops: tuple[str, ...]
    notes: tuple[str, ...]
    first: tuple[int, ...]

    def prompt(self, number: int, ids: Sequence[int], picture: Picture | None) -> Prompt:
        """Return the prompt of these tokens, which an encoder-decoder's encoder reads. picture: stands before them."""
        if self.config.encoder is not None:
            return Prompt(number, self.first, source=ids, picture=picture)
        return Prompt(number, ids, picture=picture)


@dataclass(frozen=True)
class _Asked:
    """What is asked. token_ids: of each prompt; None: a dialogue. stop: token ids that end a reply. pictures: the image
    of each prompt, where the model reads one.

    template, output, notes  on rank 0 alone
    """

    template: ChatTemplate | None
    output: Output | None
    notes: tuple[str, ...]
    token_ids: list[list[int]] | None
    stop: tuple[int, ...]
    sampling: Sampling
    pictures: list[Picture] | None


SharedOut = Callable[[Sequence[Prompt], bool, Listener | None], list[Reply]]


def _open(arguments: GenerateArguments, adapter: AdapterCheckpoint | None, mesh: ParallelMesh) -> _Opened:
    """Read the model's config, and the tokenizer where it is needed, both with the adapter's new tokens. Collective."""
    model, options, world = arguments.model, arguments.generation, mesh.world
    stops = tuple(map(unescaped, options.stop or ()))
    tokenizer = reader = None
    with together(world):
        config = read_config(model.model_path)
        labels = "to label texts, give its classifier's adapter as resume_peft_from_checkpoint; else name another model"
        check_writes_text(config, model.model_path, labels)
        if config.encoder is None:
            refuse_of_sources(config, source_prefix=options.source_prefix)
        else:
            sources.check_flags(options, config)
        image_prompts.check_flags(options, config)
        first = () if config.encoder is None else sources.first_tokens(model.model_path, config)
        check_layout(config, mesh.tp.size, mesh.pp.size, arguments.parallel.uneven_heads)
        longer = None if options.seq_length is None else check_length(config, options.seq_length)
        context = options.seq_length or config.max_position_embeddings
    weights = model.resume_from_checkpoint or model.model_path
    config, own_head = on_first(lambda: settle_head(config, weights), world)
    ahead = on_first(lambda: unread_layers(weights, base_names(config)), world)
    added = () if adapter is None else on_first(lambda: adapter_tokens(adapter, model.model_path), world)
    with together(world):
        if adapter is not None:
            config = with_rows_for(config, added, model.model_path, adapter.tensors)
        if world.is_first or (stops and mesh.tp.is_first and mesh.pp.is_first):  # whoever reads replies
            tokenizer = open_tokenizer(model.model_path, added)
            reader = Reader(tokenizer.tokenizer, stops, shown=[token.content for token in added])
    notes = tuple(note for note in (longer, own_head, ahead, unread_note(config, model.model_path)) if note)
    return _Opened(config, context, tokenizer, reader, stops, notes, first)


def _asked(arguments: GenerateArguments, opened: _Opened, recorded: str | None, mesh: ParallelMesh) -> _Asked:
    """Read the questions and render them; every rank gets the token ids. Collective.

    recorded  source of the chat template that the adapter was trained with, or the prefix of its sources
    """
    model_path, options, world = arguments.model.model_path, arguments.generation, mesh.world
    template = output = asked = pictures = None
    prefix = opened.config.prefix
    notes: tuple[str, ...] = ()
    with together(world):
        if world.is_first:
            sampling, sampled_by = sampling_of(options, sampling_defaults(model_path))
            notes = (*opened.notes, *sampled_by, *filter(None, [not_applied(model_path)]))
            if opened.config.encoder is not None:
                rows = sources.source_rows(opened.tokenizer, options, recorded)
                stop = sources.stops(model_path, rows)
                questions = sources.questions(options) if prefix is None else None
                if questions is None:
                    questions, pictures = image_prompts.read(options, opened.config)
                token_ids = sources.encode(rows, questions, opened.config)
                notes = (*notes, *rows.notes, *([f"each prompt stands behind {rows.prefix!r}"] if rows.prefix else []))
            else:
                template = template_of(options, opened.config, opened.tokenizer, recorded)
                stop = stop_token_ids(model_path, template)
                questions = questions_of(options) if prefix is None else None
                if prefix is not None:
                    questions, pictures = image_prompts.read(options, opened.config)
                notes = (*notes, *(template.notes or (f"prompts are written with {template.description}",)))
                notes = (*notes, *special_tokens(template, questions or ()))
                room = opened.context - (0 if prefix is None else prefix.tokens)
                token_ids = [encode(template, question, room) for question in questions or ()]
            if prefix is not None:
                token_ids = [[prefix.placeholder] * prefix.tokens + ids for ids in token_ids]
            stop = (*stop, *unseen_stops(opened.tokenizer.tokenizer, opened.stops))
            streamed = _is_streamed(options)
            output = None if questions is None else _output(questions, options, _repliers(arguments), streamed)
            asked = (None if questions is None else token_ids, stop, sampling, pictures)
    token_ids, stop, sampling, pictures = broadcast_object(asked, world)
    return _Asked(template, output, notes, token_ids, stop, sampling, pictures)


def _stage(
    arguments: GenerateArguments,
    config: ModelSpec,
    adapter: AdapterCheckpoint | None,
    mesh: ParallelMesh,
    device: torch.device,
) -> Stage:
    """Build this rank's part of the model, with base and adapter in it. Collective."""
    model, parallel = arguments.model, arguments.parallel
    dtype = choose_dtype(model.dtype, device, mesh.world).dtype
    with together(mesh.world):
        lora = NO_LORA if adapter is None else _resolved(adapter, config)
        base = resolve_base(model.base_format, config)
        place = Placement(mesh.tp, sequence_parallel=False, dtype=dtype, device=device, base=base)
        stage, _ = build_stage(
            config,
            mesh,
            lora,
            place,
            partition_method=parallel.partition_method,
            custom_partition=parallel.custom_partition,
            uneven_heads=parallel.uneven_heads,
        )
    with together(mesh.world):
        stage.read_pictures(pixel_reader(config, model.model_path))
        notes = load_base_weights(stage, model.resume_from_checkpoint or model.model_path)
        stage.keep_base()
        if adapter is not None:
            load_adapter(stage, adapter.tensors, adapter.where)
    tell_once(notes, mesh.world)
    return stage


# ---- the replies ----


def _talk(
    arguments: GenerateArguments, opened: _Opened, asked: _Asked, mesh: ParallelMesh, shared_out: SharedOut
) -> None:
    """Reply to what is typed, until the input ends."""
    options, chat, ear = arguments.generation, None, None
    if mesh.world.is_first:
        voice = Voice(sys.stdout, options.show_thinking)
        repliers, stdin = _repliers(arguments), sys.stdin.fileno()
        edited = edits_lines(mesh.world)
        chat = Chat(asked.template, opened.reader, voice, options.system, opened.context, stdin, repliers, edited)
    if opened.reader is not None:
        show, interrupted = (None, None) if chat is None else (chat.show, chat.interrupted)
        ear = Ear(opened.reader, show=show, interrupted=interrupted)
    dialogue(mesh.world, chat, lambda prompt, adapted: shared_out([prompt], adapted, ear)[0])


def _reply(
    arguments: GenerateArguments,
    opened: _Opened,
    asked: _Asked,
    mesh: ParallelMesh,
    shared_out: SharedOut,
    later: Later,
) -> None:
    """Reply to all prompts, a round at a time, by each of the repliers."""
    output, reader, streamed = asked.output, opened.reader, _is_streamed(arguments.generation)
    pictures = asked.pictures or [None] * len(asked.token_ids)
    pairs = zip(asked.token_ids, pictures, strict=True)
    prompts = [opened.prompt(number, ids, picture) for number, (ids, picture) in enumerate(pairs)]
    for first in range(0, len(prompts), ROUND * mesh.dp.size):
        part = prompts[first : first + ROUND * mesh.dp.size]
        for adapted in _repliers(arguments):
            ear = None
            if output is not None:
                keep = later.of(output.keep(NAMES[adapted], reader))
                ear = Ear(reader, show=output.show if streamed else None, finished=keep)
            elif reader is not None:
                ear = Ear(reader)
            replies = shared_out(part, adapted, ear)
            if output is not None:
                for prompt, reply in zip(part, replies, strict=True):
                    keep(prompt, reply)
            with together(mesh.world):
                later.check()
    with together(mesh.world):
        if output is not None:
            output.finish()


def _shared_out(
    prompts: Sequence[Prompt],
    replica: Replica,
    mesh: ParallelMesh,
    max_new_tokens: int,
    listener: Listener | None,
    later: Later,
) -> list[Reply]:
    """Return the reply to each prompt, in order: the replicas of the dp axis take turns. Collective over the world."""
    dp = mesh.dp
    with together(mesh.world):
        mine = replica.replies(prompts[dp.rank :: dp.size], max_new_tokens, listener)
        later.check()
    parts = gather_objects(mine, dp)
    return [parts[i % dp.size][i // dp.size] for i in range(len(prompts))]


# ---- who answers ----


def _repliers(arguments: GenerateArguments) -> tuple[bool, ...]:
    options = arguments.generation
    if options.compare_base:
        return True, False
    return (arguments.model.resume_peft_from_checkpoint is not None and not options.disable_adapter,)


def _adapter(arguments: GenerateArguments, mesh: ParallelMesh) -> AdapterCheckpoint | None:
    """Return the adapter that is asked for, as its files have it. Collective."""
    path = arguments.model.resume_peft_from_checkpoint
    if True not in _repliers(arguments):
        return None
    return on_first(lambda: replace(adapter_for(path, arguments.model.model_path), optimizer=None), mesh.world)


def _checked(
    arguments: GenerateArguments, opened: _Opened, adapter: AdapterCheckpoint | None, mesh: ParallelMesh
) -> tuple[AdapterCheckpoint | None, str | None]:
    """Return the adapter, without what only training needs of it, and the source of its chat template, or its prefix.

    Collective.
    """
    if adapter is None:
        return None, None
    model = arguments.model

    def check() -> tuple[tuple[str, ...], str | None]:
        weights = model.resume_from_checkpoint or model.model_path
        check_base(adapter, base_identity(opened.config, weights, opened.tokenizer.tokenizer))
        base_format = resolve_base(model.base_format, opened.config).name
        read = adapter_template if opened.config.encoder is None else adapter_prefix
        return (*adapter.notes, *other_base(adapter, base_format, model.model_path)), read(adapter)

    notes, template = on_first(check, mesh.world)
    return replace(adapter, trainer=None, notes=notes), template


def _resolved(adapter: AdapterCheckpoint, config: ModelSpec) -> ResolvedLora:
    lora_config = LoraConfig.from_dict(adapter.lora_config, adapter.where)
    try:
        return resolve_lora(lora_config, config)
    except UserError as error:
        raise UserError(
            f"adapter {adapter.where}: is of another model ({error.message})", "name an adapter of this model"
        ) from None


# ---- what is shown: replies on standard output or in a file, all else on standard error ----


def _is_streamed(options: GenerationArguments) -> bool:
    """Return whether a reply is shown token by token: in a dialogue, and of one prompt where nothing stands beside it.
    """
    if options.chats:
        return True
    return options.prompts_file is None and options.output_file is None and not options.compare_base


def _output(
    questions: Sequence[Question], options: GenerationArguments, repliers: Sequence[bool], streamed: bool
) -> Output:
    return Output(
        questions,
        options.output_file,
        names=[NAMES[adapted] for adapted in repliers],
        names_prompts=options.prompts_file is not None,
        show_thinking=options.show_thinking,
        streamed=streamed,
    )


def _say_notes(
    notes: Sequence[str], adapter: AdapterCheckpoint | None, token_ids: Sequence | None, mesh: ParallelMesh
) -> None:
    notes = [*notes, *(adapter.notes if adapter is not None else ())]
    at_a_time = 1 if token_ids is None else len(token_ids)
    if at_a_time < mesh.dp.size:
        notes.append(
            f"{mesh.dp.size - at_a_time} of {mesh.dp.size} copies of the model have nothing to do: start "
            f"{mesh.tp.size * mesh.pp.size * at_a_time} processes"
        )
    for note in notes:
        print(f"megalora: {note}", file=sys.stderr, flush=True)
