"""Classification: of each word (TOKEN_CLS) or of each text (SEQ_CLS).

Both are cross entropy over the labelled tokens; a text has one. They differ in what an evaluation reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from megalora.models.blocks.classes import ClassScores
from megalora.models.inputs import Inputs
from megalora.tasks.entities import Counts, are_entity_tags, count, kinds_of


@dataclass(frozen=True)
class Classification:
    """The tasks of peft's `TOKEN_CLS` and `SEQ_CLS`. tags: labels may be tags of entities, which are counted then."""

    tags: bool

    def loss(self, hidden: torch.Tensor, head: ClassScores, inputs: Inputs) -> torch.Tensor:
        scores, classes = head(hidden, inputs), inputs.labels[inputs.labelled]
        # Of padding alone there is nothing to sum, but backward is run all the same.
        return cross_entropy(scores, classes, reduction="sum") if len(classes) else scores.sum()

    def sums(self, hidden: torch.Tensor, head: ClassScores, inputs: Inputs) -> torch.Tensor:
        """Return the loss, the number of right classes, and (right, found, there) of each class or type of entity."""
        scores, classes = head(hidden, inputs), inputs.labels[inputs.labelled]
        chosen = scores.argmax(-1)
        loss = cross_entropy(scores, classes, reduction="sum") if len(classes) else scores.new_zeros(())
        first = torch.stack([loss.double(), (chosen == classes).sum().double()])
        if self._counts_entities(head.labels):
            counted = self._entities(chosen, classes, head.labels, inputs)
        else:
            numbers = torch.arange(len(head.labels), device=classes.device)
            ours, theirs = chosen[:, None] == numbers, classes[:, None] == numbers
            counted = torch.stack([(ours & theirs).sum(0), ours.sum(0), theirs.sum(0)], -1).double().flatten()
        return torch.cat([first, counted.to(first.device)])

    def width(self, labels: Sequence[str]) -> int:
        return 2 + 3 * len(self._counted(labels))

    def report(self, sums: Sequence[float], count: float, labels: Sequence[str] = ()) -> dict[str, float]:
        """Return loss, accuracy, and F1: over all entities, and of each type; else the mean over the classes."""
        total = count or 1
        metrics = {"loss": sums[0] / total, "accuracy": sums[1] / total}
        names, rest = self._counted(labels), list(sums[2:])
        counts = [Counts(*rest[3 * i : 3 * i + 3]) for i in range(len(names))]
        if self._counts_entities(labels):
            whole = Counts(*(sum(parts) for parts in zip(*counts, strict=True)))
            metrics |= {"precision": whole.precision, "recall": whole.recall, "f1": whole.f1}
            return metrics | {f"f1_{name}": one.f1 for name, one in zip(names, counts, strict=True)}
        seen = [one.f1 for one in counts if one.found or one.there]
        return metrics | {"f1": sum(seen) / max(1, len(seen))}

    def _counts_entities(self, labels: Sequence[str]) -> bool:
        return self.tags and are_entity_tags(labels)

    def _counted(self, labels: Sequence[str]) -> Sequence[str]:
        return kinds_of(labels) if self._counts_entities(labels) else labels

    def _entities(
        self, chosen: torch.Tensor, classes: torch.Tensor, labels: Sequence[str], inputs: Inputs
    ) -> torch.Tensor:
        """Return [3 types] float64 of the entities of every document."""
        kinds = kinds_of(labels)
        bounds = torch.tensor(inputs.bounds[1:])
        document = torch.searchsorted(bounds, inputs.labelled.cpu(), right=True).tolist()
        sums = torch.zeros(len(kinds), 3, dtype=torch.float64)
        tags: dict[int, tuple[list[str], list[str]]] = {}
        for number, ours, theirs in zip(document, chosen.tolist(), classes.tolist(), strict=True):
            predicted, expected = tags.setdefault(number, ([], []))
            predicted.append(labels[ours])
            expected.append(labels[theirs])
        for predicted, expected in tags.values():
            sums += torch.tensor(count(predicted, expected, kinds), dtype=torch.float64)
        return sums.flatten()
