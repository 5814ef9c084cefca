"""Generation, top to bottom: questions, model, adapter, replies.

    python tools/generate.py --model_path DIR --resume_peft_from_checkpoint out --prompt "Who are you?"
    torchrun --nproc_per_node 4 tools/generate.py --model_path DIR --prompts_file prompts.txt \
        --output_file replies.jsonl --tensor_parallel_size 2 --pipeline_parallel_size 2

Text is read, rendered and shown by rank 0 alone; the other ranks see token ids.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megalora.arguments import GenerateArguments, GenerationArguments
from megalora.building import build_stage, load_adapter, load_base_weights, resolve_dtype, resolve_lora
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.base.shards import AdapterCheckpoint
from megalora.cluster.launch import choose_device, distributed
from megalora.cluster.watch import Watch
from megalora.data import ChatTemplate
from megalora.data.template import TemplateOptions
from megalora.data.tokenizer import OpenedTokenizer, open_tokenizer
from megalora.errors import UserError
from megalora.generation.defaults import sampling_defaults, unescaped
from megalora.generation.dialogue import NAMES, Chat, dialogue
from megalora.generation.logits import LogitsFolder
from megalora.generation.output import Output
from megalora.generation.prompts import Question, ask, encode, read_questions, stop_token_ids, unseen_stops
from megalora.generation.replica import Listener, Prompt, Replica, Reply
from megalora.generation.sampling import Sampling
from megalora.generation.terminal import Voice
from megalora.generation.text import Ear, Reader
from megalora.identity import adapter_template, base_identity, check_base
from megalora.lora import LoraConfig, ResolvedLora
from megalora.models.config import ModelConfig, check_layout, read_config
from megalora.models.stage import NO_LORA
from megalora.parallel.collectives import broadcast_object, gather_objects, on_first, together
from megalora.parallel.linear import Placement
from megalora.parallel.mesh import ParallelMesh

SEED = 42  # of the sampling, where none is given
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
ROUND = 512  # prompts of one replica between two exchanges of replies
# How long a replica waits for the others' replies, or for the person at the terminal: the watch finds ranks that die.
PATIENCE = datetime.timedelta(days=30)


def generate(arguments: GenerateArguments) -> None:
    """Runs `arguments` on this process of the mesh. Raises UserError, on every rank, for what the user can mend."""
    model, parallel, options = arguments.model, arguments.parallel, arguments.generation
    device, remark = choose_device()
    watch = Watch(heartbeat_timeout=parallel.heartbeat_timeout)
    with distributed(device, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, watch, PATIENCE) as mesh:
        world = mesh.world

        # What is asked: the questions of the command line or of a file, or a dialogue (None).
        questions = template = reader = output = asked = opened = None
        # Who replies: the adapted model (True) or the base, or both, one after another.
        repliers, streamed = _repliers(arguments), _is_streamed(options)
        stops = tuple(map(unescaped, options.stop or ()))
        with together(world):
            config = read_config(model.model_path)
            check_layout(config, mesh.tp.size, mesh.pp.size, parallel.uneven_heads)
            context = _context(config, options)
            if world.is_first or (options.stop and mesh.tp.is_first and mesh.pp.is_first):  # whoever reads replies
                opened = open_tokenizer(model.model_path)
                reader = Reader(opened.tokenizer, stops)

        # Who answers: the adapter, and the chat template that it was trained with.
        adapter, recorded = _adapter(arguments, config, opened, mesh)
        with together(world):
            if world.is_first:
                variables = TemplateOptions(
                    options.template_variables, special_tokens_in_text=options.special_tokens_in_text
                )
                template = ChatTemplate.of(opened, options.template, variables, recorded)
                stop = stop_token_ids(model.model_path, template)
                stop = (*stop, *unseen_stops(template.tokenizer, stops))
                sampling, sampled_by = _sampling(options, sampling_defaults(model.model_path))
                questions = _questions(options)
                token_ids = questions and [encode(template, question, context) for question in questions]
                output = None if questions is None else _output(questions, options, repliers, streamed)
                asked = (token_ids, stop, sampling)
        token_ids, stop, sampling = broadcast_object(asked, world)

        # The model's shape, and this rank's part of model and adapter.
        later = _Later()
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
            stage.keep_base()
            if adapter is not None:
                load_adapter(stage, adapter.tensors, adapter.where)
            keep_logits = later.of(LogitsFolder(options.logits_dir).save) if options.return_logits else None
        replica = Replica(
            stage,
            mesh.pp,
            mesh.tp,
            context,
            sampling,
            stop,
            listened_to=streamed or options.stop is not None,
            keep_logits=keep_logits,
        )
        if world.is_first:
            _say_notes([remark, *sampled_by, _specials(template, questions or ())], adapter, template, token_ids, mesh)

        def shared_out(prompts: Sequence[Prompt], adapted: bool, listener: Listener | None) -> list[Reply]:
            replica.switch_adapter(adapted)
            return _shared_out(prompts, replica, mesh, options.max_new_tokens, listener, later)

        # The replies.
        if token_ids is None:
            chat = ear = None
            if world.is_first:
                voice = Voice(sys.stdout, options.show_thinking)
                chat = Chat(template, reader, voice, options.system, context, sys.stdin.fileno(), repliers)
            if reader is not None:
                ear = Ear(reader, show=chat and chat.show, interrupted=chat and chat.interrupted)
            dialogue(world, chat, lambda prompt, adapted: shared_out([prompt], adapted, ear)[0])
            return
        prompts = [Prompt(number, ids) for number, ids in enumerate(token_ids)]
        for first in range(0, len(prompts), ROUND * mesh.dp.size):
            part = prompts[first : first + ROUND * mesh.dp.size]
            for adapted in repliers:
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
                with together(world):
                    later.check()
        with together(world):
            if output is not None:
                output.finish()


def _shared_out(
    prompts: Sequence[Prompt],
    replica: Replica,
    mesh: ParallelMesh,
    max_new_tokens: int,
    listener: Listener | None,
    later: _Later,
) -> list[Reply]:
    """The reply to each prompt, in order: the replicas of the dp axis take turns. Collective over the world."""
    dp = mesh.dp
    with together(mesh.world):
        mine = replica.replies(prompts[dp.rank :: dp.size], max_new_tokens, listener)
        later.check()
    parts = gather_objects(mine, dp)
    return [parts[i % dp.size][i // dp.size] for i in range(len(prompts))]


class _Later:
    """What one rank does by itself while all make replies: its UserError waits until they can all hear of it."""

    def __init__(self):
        self._error: UserError | None = None

    def of(self, work: Callable[..., None]) -> Callable[..., None]:
        """`work`, which does nothing any more once it or another has failed."""

        def tried(*arguments: object) -> None:
            if self._error is None:
                try:
                    work(*arguments)
                except UserError as error:
                    self._error = error

        return tried

    def check(self) -> None:
        if self._error is not None:
            raise self._error


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


def _sampling(options: GenerationArguments, defaults: Mapping[str, float]) -> tuple[Sampling, list[str]]:
    """How replies are sampled: by the flags, and by `defaults` of the model where they say nothing; lines on that."""
    taken = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    chosen = {name: taken.get(name, getattr(options, name)) for name in _SAMPLING}
    sampling = Sampling(
        chosen["temperature"] or 0.0,
        int(chosen["top_k"]) if chosen["top_k"] else None,
        chosen["top_p"],
        chosen["min_p"] or None,
        1.0 if chosen["repetition_penalty"] is None else chosen["repetition_penalty"],
        SEED if options.seed is None else options.seed,
    )
    if sampling.temperature == 0:
        for name in ("top_k", "top_p", "min_p"):
            if getattr(options, name) is not None and options.temperature is None:
                raise UserError(
                    f"{name} {getattr(options, name):g} has no effect with temperature 0, which is what this model's "
                    "generation_config.json leaves: give a --temperature above 0, or leave it out"
                )
        taken = {name: value for name, value in taken.items() if name == "repetition_penalty"}
    told = ", ".join(f"{name} {value:g}" for name, value in taken.items())
    lines = [f"generation_config.json of the model says {told}: flags go on top"] if told else []
    if sampling.temperature == 0 and options.seed is not None and options.temperature is None:
        lines.append("not applied in generation: seed, because the likeliest token is taken")
    return sampling, lines


# ---- who answers ----


def _repliers(arguments: GenerateArguments) -> tuple[bool, ...]:
    options = arguments.generation
    if options.compare_base:
        return True, False
    return (arguments.model.resume_peft_from_checkpoint is not None and not options.disable_adapter,)


def _adapter(
    arguments: GenerateArguments, config: ModelConfig, opened: OpenedTokenizer | None, mesh: ParallelMesh
) -> tuple[AdapterCheckpoint | None, str | None]:
    """The adapter that is asked for, without what only training needs of it, and the source of its chat template.

    Collective; rank 0 has the tokenizer.
    """
    model, path = arguments.model, arguments.model.resume_peft_from_checkpoint
    if True not in _repliers(arguments):
        return None, None

    def read() -> tuple[AdapterCheckpoint, str | None]:
        adapter = open_adapter(path)
        check_base(adapter, base_identity(config, model.resume_from_checkpoint or model.model_path, opened.tokenizer))
        return replace(adapter, optimizer=None, trainer=None), adapter_template(adapter)

    return on_first(read, mesh.world)


def _resolved(adapter: AdapterCheckpoint, config: ModelConfig) -> ResolvedLora:
    lora_config = LoraConfig.from_dict(adapter.lora_config, adapter.where)
    try:
        return resolve_lora(lora_config, config)
    except UserError as error:
        raise UserError(f"adapter {adapter.where}: is of another model ({error})") from None


# ---- what is shown: replies on standard output or in a file, all else on standard error ----


def _is_streamed(options: GenerationArguments) -> bool:
    """Whether a reply is shown token by token: in a dialogue, and of one prompt where nothing stands beside it."""
    if options.prompt is None and options.prompts_file is None:
        return True
    return options.prompt is not None and options.output_file is None and not options.compare_base


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


def _specials(template: ChatTemplate, questions: Sequence[Question]) -> str | None:
    """A line where prompts write special tokens."""
    count = sum(template.special_in_text(question.conversation) for question in questions)
    return f"special tokens in the prompts are tokenised as text ({count:,} times)" if count else None


def _say_notes(
    remarks: Sequence[str | None],
    adapter: AdapterCheckpoint | None,
    template: ChatTemplate,
    token_ids: Sequence | None,
    mesh: ParallelMesh,
) -> None:
    notes = [remark for remark in remarks if remark]
    notes += adapter.notes if adapter is not None else ()
    notes += template.notes or (f"prompts are written with {template.description}",)
    at_a_time = 1 if token_ids is None else len(token_ids)
    if at_a_time < mesh.dp.size:
        notes.append(
            f"{mesh.dp.size - at_a_time} of {mesh.dp.size} copies of the model have nothing to do: start "
            f"{mesh.tp.size * mesh.pp.size * at_a_time} processes"
        )
    for note in notes:
        print(f"megalora: {note}", file=sys.stderr, flush=True)
