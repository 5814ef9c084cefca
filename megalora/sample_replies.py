"""Replies to sample prompts while a run trains: of its own stages, greedy, at the start, at evaluations and at the end.

They are lines of replies.jsonl: {"step", "replies": [{"prompt", "response", "finish_reason"}, ...]}, with "image" (its
path) behind the prompt where the model reads one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megalora.data import ChatTemplate, Rendering
from megalora.data.images import ImageRows
from megalora.errors import UserError
from megalora.flags import FinetuneArguments
from megalora.generation.prompts import encode, read_questions, stop_token_ids
from megalora.generation.replica import Replica
from megalora.generation.requests import Prompt, Reply
from megalora.generation.sampling import Sampling
from megalora.generation.text import Reader
from megalora.image_prompts import read_rows_with_images
from megalora.models.spec import ModelSpec
from megalora.models.stage import Stage
from megalora.parallel.collectives import broadcast_object, gather_objects, on_first, together
from megalora.parallel.mesh import ParallelMesh

MOST_PROMPTS = 32
MOST_CHARACTERS = 2000  # of a prompt, in replies.jsonl
_GREEDY = Sampling(temperature=0.0, seed=0)


class SampleReplies:
    """The prompts of a file, and the replies that the stages of a run give to them. Every rank has one (collective).

    Raises UserError for prompts that cannot be used, and for a task or a schedule that does not write text here.
    """

    def __init__(
        self, arguments: FinetuneArguments, config: ModelSpec, task: str, template: Rendering, mesh: ParallelMesh
    ):
        self._mesh, self._room = mesh, arguments.train.sample_max_new_tokens
        self._context = config.max_position_embeddings
        with together(mesh.world):
            written = template.rows if isinstance(template, ImageRows) else template
            if not isinstance(written, ChatTemplate):
                raise UserError(f"sample_prompts has no effect for task_type {task}", "leave it out")
            if arguments.parallel.virtual_pipeline_size > 1:
                raise UserError(
                    "sample_prompts is not implemented with virtual_pipeline_size above 1",
                    "leave one of them out; megalora generate replies with the checkpoints of the run",
                )
        self._tokenizer = written.tokenizer
        asked = on_first(lambda: self._asked(arguments, config, written), mesh.world)
        self._told, self._prompts, self._stop = asked

    @classmethod
    def of(
        cls, arguments: FinetuneArguments, config: ModelSpec, task: str, template: Rendering, mesh: ParallelMesh
    ) -> SampleReplies | None:
        """Return those of a run; None where it has no sample prompts. Collective."""
        if arguments.train.sample_prompts is None:
            return None
        return cls(arguments, config, task, template, mesh)

    def _asked(
        self, arguments: FinetuneArguments, config: ModelSpec, template: ChatTemplate
    ) -> tuple[list[dict[str, str]], list[Prompt], tuple[int, ...]]:
        """Return what replies.jsonl says of each prompt, the prompts, and the token ids that end a reply."""
        file, model_path = Path(arguments.train.sample_prompts or ""), arguments.model.model_path
        first, pictures = list[int](), None
        if config.prefix is None:
            questions = read_questions(file, None, what="sample_prompts")
        else:
            questions, pictures = read_rows_with_images(file, None, config, "sample_prompts")
            first = [config.prefix.placeholder] * config.prefix.tokens
        if len(questions) > MOST_PROMPTS:
            raise UserError(
                f"sample_prompts {file}: holds {len(questions)} prompts, and at most {MOST_PROMPTS} are taken",
                "leave some out: the run waits for their replies",
            )
        told, prompts = [], []
        for number, (question, picture) in enumerate(zip(questions, pictures or [None] * len(questions), strict=True)):
            ids = [*first, *encode(template, question, self._context - len(first))]
            prompts.append(Prompt(number, ids, picture=picture))
            told.append({**question.told, "prompt": question.text[:MOST_CHARACTERS]})
        return told, prompts, stop_token_ids(model_path, template)

    def replies(self, stage: Stage) -> list[dict[str, Any]]:
        """Return what the stages reply now, on every rank. Collective.

        The copies of the model take turns at the prompts. Raises UserError where logits are not finite.
        """
        prompts = self._prompts
        # No longer than is needed: memory is the run's.
        context = min(self._context, max(len(prompt.token_ids) for prompt in prompts) + self._room)
        replies = greedy_replies(stage, self._mesh, prompts, context, self._stop, self._room)
        told = None
        if self._mesh.world.is_first:
            reader = Reader(self._tokenizer)
            answers = [reader.answer(reply, prompt) for reply, prompt in zip(replies, prompts, strict=True)]
            told = [
                {**asked, "response": answer.whole, "finish_reason": answer.finish_reason}
                for asked, answer in zip(self._told, answers, strict=True)
            ]
        return broadcast_object(told, self._mesh.world)


def greedy_replies(
    stage: Stage, mesh: ParallelMesh, prompts: Sequence[Prompt], context: int, stop: Collection[int], room: int
) -> list[Reply]:
    """Return what the stages of a run reply now to each prompt, in order, on every rank. Collective.

    context  longest prompt and reply together, in tokens; room: longest reply; stop: token ids that end one
    The copies of the model take turns at the prompts. Raises UserError where logits are not finite.
    """
    copies = mesh.replicas
    with together(mesh.world), stage.place.with_whole_tokens():
        replica = Replica(stage, mesh.pp, mesh.tp, context, _GREEDY, stop)
        mine = replica.replies(prompts[copies.rank :: copies.size], room)
    parts = gather_objects(mine, copies)
    return [parts[i % copies.size][i // copies.size] for i in range(len(prompts))]
