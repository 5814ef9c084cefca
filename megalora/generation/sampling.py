"""From logits to the next token, so that a seed gives the same text on every layout and device.

The one random number of a token comes from (seed, prompt, place in the reply) alone, not from a generator's state. It
picks from the cumulative probabilities in the order of the ids, so that a difference of rounding between two layouts
matters only where the number falls within that rounding of the border between two tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalora.batch import to_device

NOT_FINITE = -1
"""In place of a token id, where the logits are not finite."""
_MOST_PARTS = 64


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k, top_p and min_p narrow the choice, in this order, as in transformers.

    repetition_penalty  logits of the tokens of the prompt and of the reply so far are divided by it where they are
                        positive, multiplied where not (Keskar et al. 2019); greedy or not; 1: none
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0


def draw(seed: int, prompt: int, place: int) -> float:
    """Return a uniform number in (0, 1) for token `place` of the reply to prompt number `prompt`."""
    digest = hashlib.sha256(f"{seed}:{prompt}:{place}".encode()).digest()
    return (int.from_bytes(digest[:6], "little") + 0.5) / 2**48


def choose(logits: torch.Tensor, sampling: Sampling, draws: Sequence[float]) -> torch.Tensor:
    """Return the next token of each row of logits [n, vocab_size]: [n] int64, NOT_FINITE where a logit is not.

    draws  one number in (0, 1) a row, not read when greedy. The lowest id wins a greedy tie.
    """
    best, ids = _largest(logits)
    if sampling.temperature > 0:
        ids = _sample(logits, sampling, to_device(torch.tensor(draws, dtype=torch.float64), logits.device))
    return torch.where(best - best == 0, ids, NOT_FINITE)  # two kernels, where isfinite() is four


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest of each row of logits [n, vocab_size] and its id: of equal ones the first; NaN where any is.

    In parts of the vocabulary first: a GPU has one block of threads for each result, which takes 39 us for 128,256
    tokens.
    """
    parts = math.gcd(logits.shape[-1], _MOST_PARTS)
    of_parts, ids = logits.unflatten(-1, (parts, -1)).max(dim=-1)
    best, part = of_parts.max(dim=-1)
    return best, ids.gather(-1, part.unsqueeze(-1)).squeeze(-1) + part * (logits.shape[-1] // parts)


def _sample(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor) -> torch.Tensor:
    scaled = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p is not None:
        ranked = probabilities.sort(dim=-1, descending=True).values
        before = ranked.cumsum(dim=-1) - ranked
        least = ranked.where(before < sampling.top_p, torch.inf).amin(dim=-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= least, 0.0)
    if sampling.min_p is not None:
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= least, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    target = draws.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


@dataclass(frozen=True)
class Logprobs:
    """Log-probability of a token, and the likeliest tokens at its place: (token id, log-probability), best first.

    Of the model itself: before temperature, penalty and what else narrows the choice.
    """

    chosen: float
    likeliest: tuple[tuple[int, float], ...]


def logprobs(logits: torch.Tensor, chosen: torch.Tensor, counts: Sequence[int]) -> list[Logprobs]:
    """Return the Logprobs of the tokens `chosen` [n] from logits [n, vocab_size], each with counts[i] likeliest tokens.
    """
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    own = logs.gather(1, chosen.clamp(min=0).unsqueeze(1)).squeeze(1).tolist()
    best = logs.topk(min(max(counts), logs.shape[1]))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    pairs = [tuple(zip(ids, values, strict=True)) for ids, values in ranked]
    return [Logprobs(value, some[:count]) for value, some, count in zip(own, pairs, counts, strict=True)]


class Seen:
    """Which tokens each of `slots` sequences holds, for the repetition penalty."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str):
        self._seen = torch.zeros(slots, vocab_size, dtype=torch.bool, device=device)

    def start(self, slot: int, token_ids: Sequence[int]) -> None:
        """Begin a new sequence in `slot`, with the tokens of its prompt."""
        self._seen[slot] = False
        self._seen[slot, torch.tensor(token_ids, device=self._seen.device)] = True

    def add(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Add one more token, token_ids[i], of slots[i]; both [n] int64."""
        # Not by an index: `self._seen[slots, token_ids] = True` waits for a GPU.
        self._seen.view(-1).index_fill_(0, slots * self._seen.shape[1] + token_ids, True)

    def penalised(self, logits: torch.Tensor, slots: torch.Tensor, penalty: float) -> torch.Tensor:
        """Return logits [n, vocab_size] of the sequences in slots [n], in float32 or wider."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        less = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self._seen[slots], less, logits)
