"""Who says which token comes next: the first rank of the last stage, to all ranks of a replica."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megalora.batch import to_device
from megalora.generation.sampling import Logprobs, Sampling, Seen, choose, logprobs
from megalora.generation.sequences import Ongoing, by_sampling
from megalora.parallel.collectives import broadcast_object
from megalora.parallel.mesh import Axis


class Chooser:
    """pp, tp  this rank's place in the replica; device: of the logits. chooses: whether this is the rank that does."""

    def __init__(self, pp: Axis, tp: Axis, device: torch.device | str):
        self._pp, self._tp, self._device = pp, tp, device
        self.chooses = pp.is_last and tp.is_first
        self._seen: Seen | None = None

    def remember(self, slots: int, vocab_size: int) -> None:
        """Begin to remember the tokens of `slots` sequences, which repetition_penalty reads."""
        if self.chooses:
            self._seen = Seen(slots, vocab_size, self._device)

    def begin(self, sequence: Ongoing) -> None:
        """Remember the prompt of a sequence that enters."""
        if self._seen is not None and sequence.request.sampling.repetition_penalty != 1.0:
            self._seen.start(sequence.slot, sequence.prompt.token_ids)

    def choose(self, fed: Sequence[Ongoing], logits: torch.Tensor | None, ahead: int = 0) -> torch.Tensor:
        """Return the next token [n] int64 of each sequence, on every rank, from the logits [n, vocab_size] of the last
        stage. It lies on the device, and nothing waits for it.

        ahead  how many tokens of each reply are not known on the host yet
        """
        chosen = torch.empty(len(fed), dtype=torch.int64, device=self._device)
        if self.chooses:
            for sampling, rows in by_sampling(fed).items():
                if len(rows) == len(fed):
                    chosen.copy_(self._choose(logits, sampling, fed, ahead))
                    continue
                place = to_device(torch.tensor(rows), self._device)
                chosen[place] = self._choose(logits[place], sampling, [fed[row] for row in rows], ahead)
        if self._pp.is_last:
            broadcast(chosen, self._tp, self._tp.ranks[0])
        broadcast(chosen, self._pp, self._pp.ranks[-1])
        return chosen

    def _choose(
        self, logits: torch.Tensor, sampling: Sampling, fed: Sequence[Ongoing], ahead: int
    ) -> torch.Tensor:
        """Return the next token [n] of sequences that are sampled alike, from their logits [n, vocab_size]."""
        penalised = self._seen is not None and sampling.repetition_penalty != 1.0
        slots = to_device(torch.tensor([sequence.slot for sequence in fed]), logits.device) if penalised else None
        if penalised:
            logits = self._seen.penalised(logits, slots, sampling.repetition_penalty)
        chosen = choose(logits, sampling, [sequence.draw(ahead) for sequence in fed])
        if penalised:
            self._seen.add(slots, chosen.clamp(min=0))
        return chosen

    def tell_logprobs(self, fed: Sequence[Ongoing], logits: torch.Tensor | None, chosen: torch.Tensor) -> None:
        """Give the sequences that ask for them the log-probabilities of their tokens, where a listener may be."""
        rows = [row for row, sequence in enumerate(fed) if sequence.request.logprobs is not None]
        if not rows:
            return
        told: list[Logprobs] = []
        if self.chooses:
            told = logprobs(logits[rows], chosen[rows], [fed[row].request.logprobs for row in rows])
        if self._tp.is_first:
            told = broadcast_object(told, self._pp, self._pp.size - 1)
        for row, one in zip(rows, told, strict=False):
            fed[row].logprobs = one


class Underway:
    """A step that runs, or has run: the tokens that it chooses are on their way to the host.

    fed     the sequences it goes on
    chosen  [n] int64, the next token of each
    """

    def __init__(self, fed: Sequence[Ongoing], chosen: torch.Tensor):
        self.fed, self.chosen = fed, chosen
        self._told, self._arrived = chosen, None
        if chosen.is_cuda:  # of what runs behind it, nothing is waited for
            self._told = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self._told.copy_(chosen, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def of(self, running: Sequence[Ongoing]) -> list[Ongoing]:
        """Return those of its sequences that are still running."""
        known = set(map(id, running))
        return [sequence for sequence in self.fed if id(sequence) in known]

    def tokens(self, fed: Sequence[Ongoing]) -> list[int]:
        """Return the tokens of these of its sequences, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        told = {id(sequence): token for sequence, token in zip(self.fed, self._told.tolist(), strict=True)}
        return [told[id(sequence)] for sequence in fed]


def broadcast(x: torch.Tensor, axis: Axis, source: int) -> None:
    """Broadcast x of global rank `source`, on every rank of the axis, in place."""
    if axis.size > 1:
        dist.broadcast(x, source, group=axis.group)
