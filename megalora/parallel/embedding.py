"""The embedding and the head, cut over tp on the vocabulary; a vocabulary that tp does not divide is cut unevenly."""

from __future__ import annotations

import torch
from torch import nn

from megalora.ops import limits
from megalora.ops.cross_entropy import LogitForm
from megalora.ops.matmul import matmul, matmul_nt
from megalora.parallel.collectives import all_gather, all_reduce, local_tokens
from megalora.parallel.placement import Placement
from megalora.parallel.split import Split, even_part, shard_range


def padded(rows: int, place: Placement) -> int:
    """Return the rows that are kept of a matrix of so many: on a GPU a multiple of what aligns the rows of logits.

    Products with an odd vocabulary run on other kernels, four to five times as slow (Granite's 49,155 tokens: 33 ms of
    a step of 335 on an H200), and the kernels of the loss do not take its logits.
    """
    each = limits.ALIGNMENT // place.dtype.itemsize if torch.device(place.device).type == "cuda" else 1
    return -(-rows // each) * each


class _VocabParallel(nn.Module):
    """A frozen matrix [vocab_size / tp, hidden_size]: rows [start, stop) of the whole."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement):
        super().__init__()
        self.place = place
        self.vocab_size = vocab_size
        part = even_part(vocab_size, place.tp)
        self.start, self.stop = part.start, part.stop
        self._split = part.cut().split((vocab_size, hidden_size), 0)
        rows = self._split.local_shape[0]
        weight = torch.empty(padded(rows, place), hidden_size, dtype=place.dtype, device=place.device)
        weight[rows:] = 0
        self.weight = nn.Parameter(weight[:rows], requires_grad=False)

    def shard_dims(self) -> dict[str, Split]:
        return {"weight": self._split}


class VocabParallelEmbedding(_VocabParallel):
    """Each rank looks up the ids it owns; the sum over tp is the whole (exact: all other terms are zero)."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map input_ids [F] to [T, hidden_size]: this rank's tokens under sequence parallelism, else all."""
        tp = self.place.tp
        if tp.size == 1:
            return nn.functional.embedding(input_ids, self.weight)
        mine = (input_ids >= self.start) & (input_ids < self.stop)
        rows = nn.functional.embedding((input_ids - self.start) * mine, self.weight)
        hidden = all_reduce(rows.mul_(mine.unsqueeze(-1)), tp)
        # A copy: what is kept of it for backward must not keep the other ranks' tokens.
        return local_tokens(hidden, tp).clone() if self.place.cuts_tokens else hidden


class VocabParallelHead(_VocabParallel):
    """lm_head. Training reads `logits` and the weight through `parallel.loss`; `forward` gives all logits (generation).

    bias, scale, softcap  logits are of the LogitForm of s = h W^T + bias
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        place: Placement,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ):
        super().__init__(vocab_size, hidden_size, place)
        self.form = LogitForm(scale, softcap)
        self.register_parameter("bias", None)
        self._row: list[nn.Parameter] = []
        if bias:
            self._bias_split = even_part(vocab_size, place.tp).cut().split((vocab_size,), 0)
            values = torch.empty(self._bias_split.local_shape, dtype=place.dtype, device=place.device)
            self.bias = nn.Parameter(values, requires_grad=False)

    def shard_dims(self) -> dict[str, Split]:
        return super().shard_dims() | ({} if self.bias is None else {"bias": self._bias_split})

    def take_bias_row(self) -> nn.Parameter:
        """Give the head a bias [1, vocab_size / tp], zero unless a file has it; whoever takes it registers it."""
        row = torch.zeros(1, self.stop - self.start, dtype=self.place.dtype, device=self.place.device)
        self._row.append(nn.Parameter(row, requires_grad=False))
        return self._row[0]

    @property
    def row_split(self) -> Split:
        """How tp cuts `take_bias_row`'s."""
        return even_part(self.vocab_size, self.place.tp).cut().split((1, self.vocab_size), 1)

    @property
    def added(self) -> torch.Tensor | None:
        """What is added to h W^T, [vocab_size / tp], or None."""
        return self._row[0][0] if self._row else self.bias

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden [N, hidden_size], whole on each rank to logits [N, vocab_size / tp] of this rank's rows; on a GPU
        zeros may stand behind each row of these.
        """
        return self.form.apply_(self._products(hidden))

    def unformed(self, hidden: torch.Tensor) -> tuple[torch.Tensor, LogitForm]:
        """Return (s, what makes the logits of it) in place of `logits`, for kernels that do so as they read them."""
        return self._products(hidden), self.form

    def _products(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return s of `logits`."""
        weight, added = self._padded(), self.added
        if len(weight) > len(self.weight) and added is not None:
            added = nn.functional.pad(added, (0, len(weight) - len(added)))
        return matmul_nt(hidden, weight, added)[:, : len(self.weight)]

    def _padded(self) -> torch.Tensor:
        """Return the weight with the rows of zeros that stand behind it (see `padded`)."""
        shape = padded(len(self.weight), self.place), self.weight.shape[1]
        return self.weight if shape == self.weight.shape else self.weight.as_strided(shape, self.weight.stride())

    def gradient(self, dlogits: torch.Tensor) -> torch.Tensor:
        """Return dlogits W [N, hidden_size], for dlogits in the place of `logits`, whose columns behind are zeros."""
        weight = self._padded()
        return matmul(dlogits.as_strided((len(dlogits), len(weight)), dlogits.stride()), weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden [N, hidden_size], whole on each rank to logits [N, vocab_size], whole on each rank."""
        logits = self.logits(hidden)
        tp = self.place.tp
        if tp.size == 1:
            return logits
        widest = -(-self.vocab_size // tp.size)  # parts may differ by one row: gather them padded
        padded = logits.new_zeros(widest, logits.shape[0])
        padded[: logits.shape[1]] = logits.t()
        parts = all_gather(padded, tp).view(tp.size, widest, -1)
        ranges = (shard_range(self.vocab_size, rank, tp.size) for rank in range(tp.size))
        return torch.cat([part[: b - a] for part, (a, b) in zip(parts, ranges, strict=True)]).t()
