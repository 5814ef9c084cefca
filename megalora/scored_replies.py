"""Replies to evaluation rows while a run trains, and their ROUGE-L: of its own stages, greedy, at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalora import sources
from megalora.data import PackedRows, Rendering
from megalora.data.images import ImageRows
from megalora.data.pairs import PairRows
from megalora.errors import UserError
from megalora.flags import FinetuneArguments
from megalora.generation.prompts import decode
from megalora.generation.requests import Prompt
from megalora.models.spec import ModelSpec
from megalora.models.stage import Stage
from megalora.parallel.collectives import broadcast_object, on_first, together
from megalora.parallel.mesh import ParallelMesh
from megalora.sample_replies import greedy_replies
from megalora.tasks.rouge import rouge_l


@dataclass(frozen=True)
class ScoredReplies:
    """Prompts of evaluation rows, and the replies and scores of them. Every rank has one.

    prompts    of all sets, one after another
    expected   the text that each is to become
    sets       (name, how many of the prompts) of each set
    room       longest reply in tokens: no target is longer
    """

    rows: PairRows
    prompts: tuple[Prompt, ...]
    expected: tuple[str, ...]
    sets: tuple[tuple[str, int], ...]
    stop: tuple[int, ...]
    context: int
    room: int
    mesh: ParallelMesh

    @classmethod
    def of(
        cls,
        arguments: FinetuneArguments,
        config: ModelSpec,
        task: str,
        template: Rendering,
        evaluations: Mapping[str, PackedRows],
        mesh: ParallelMesh,
    ) -> ScoredReplies | None:
        """Return those of a run: of the first eval_generate documents of each set; None where none are asked for.

        Collective. Raises UserError, on every rank, for a task or a schedule that does not write text here.
        """
        count, model_path = arguments.train.eval_generate, arguments.model.model_path
        if not count:
            return None
        rows = template.rows if isinstance(template, ImageRows) else template
        with together(mesh.world):
            if not isinstance(rows, PairRows):
                raise UserError(f"eval_generate has no effect for task_type {task}", "leave it out")
            if arguments.parallel.virtual_pipeline_size > 1:
                raise UserError(
                    "eval_generate is not implemented with virtual_pipeline_size above 1",
                    "leave one of them out; megalora generate replies with the checkpoints of the run",
                )
        first, stop = on_first(
            lambda: (sources.first_tokens(model_path, config), sources.stops(model_path, rows)), mesh.world
        )
        prompts, expected, sets = list[Prompt](), list[str](), list[tuple[str, int]]()
        for name, packed in evaluations.items():
            members = sorted(set(packed.members.tolist()))[:count]
            sets.append((name, len(members)))
            for document in map(packed.source.sample, members):
                source, target = rows.sides.parts(document)
                ids = source.input_ids.tolist()
                prompts.append(Prompt(len(prompts), first, source=ids, picture=document.picture))
                expected.append(decode(rows.tokenizer, target.labels.tolist()))
        room = arguments.data.seq_length
        context = min(config.max_position_embeddings, len(first) + room)
        return cls(rows, tuple(prompts), tuple(expected), tuple(sets), stop, context, room, mesh)

    def scores(self, stage: Stage) -> tuple[float, dict[str, float]]:
        """Return the mean ROUGE-L of all replies, and that of each set by its name, on every rank. Collective.

        Raises UserError where logits are not finite.
        """
        replies = greedy_replies(stage, self.mesh, self.prompts, self.context, self.stop, self.room)
        found: list[float] = []
        if self.mesh.world.is_first:
            said = [decode(self.rows.tokenizer, reply.token_ids) for reply in replies]
            found = [rouge_l(theirs, ours) for theirs, ours in zip(self.expected, said, strict=True)]
        found = broadcast_object(found, self.mesh.world)
        of_sets, at = {}, 0
        for name, count in self.sets:
            of_sets[name] = sum(found[at : at + count]) / count
            at += count
        return sum(found) / len(found), of_sets
