"""Where a stage's parameters live, and what its linears need to know of a microbatch's tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from megalora.ops.dropout import Dropout
from megalora.parallel.collectives import local_tokens
from megalora.parallel.exchange import Exchange
from megalora.parallel.formats import BaseFormat
from megalora.parallel.mesh import Axis


@dataclass(frozen=True)
class Tokens:
    """The tokens of one microbatch, as its linears see them.

    index       [F] int64, Batch.token_index
    local       [T] int64, the part of `index` that this rank holds under sequence parallelism, else all of it
    seed, step  of the run: with `index` they fix every dropout mask; seed None means no dropout (evaluation). A step
                may be an int64 scalar on the device (see Dropout)
    adapters    [F] int64, which of several adapters applies to each token, 0 for none; None: the one adapter applies to
                all (see LinearGroup.share). In generation, where no token is sharded
    """

    index: torch.Tensor
    local: torch.Tensor
    seed: int | None
    step: int | torch.Tensor
    adapters: torch.Tensor | None = None

    def draw(self, p: float, site: int, feature_offset: int = 0) -> Dropout | None:
        """Return the dropout of one input, None where there is none. site, feature_offset: see Dropout."""
        if self.seed is None or p == 0.0:
            return None
        return Dropout(p=p, seed=self.seed, site=site, step=self.step, feature_offset=feature_offset)

    def rows(self, rows: slice) -> Tokens:
        """Return the `rows` of the local tokens, with those of all ranks that are gathered with them."""
        ranks = self.index.shape[0] // self.local.shape[0]
        return replace(self, index=self.index.view(ranks, -1)[:, rows].flatten(), local=self.local[rows])


@dataclass
class _Whole:
    """Whether no token is cut just now. One object for a stage, whose placements are made of one another."""

    now: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a layer's parameters live: tp axis, sequence parallelism, compute dtype, device.

    exchange  how tokens travel beside the products, under sequence parallelism; None: by collectives, before and after
    cp        context-parallel axis: tokens of a document are cut over it
    base      the format of the frozen weights; one object for a stage, whose matrices share memory through it
    """

    tp: Axis
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device | str
    exchange: Exchange | None = None
    base: BaseFormat = field(default_factory=BaseFormat, compare=False)
    cp: Axis = Axis()
    _whole: _Whole = field(default_factory=_Whole, compare=False, repr=False)

    @contextlib.contextmanager
    def with_whole_tokens(self) -> Iterator[None]:
        """Generate inside, with a stage that trains with sequence parallelism: every tp rank has all tokens."""
        before, self._whole.now = self._whole.now, True
        try:
            yield
        finally:
            self._whole.now = before

    @property
    def master_dtype(self) -> torch.dtype:
        """Of what is trained: float32, or float64 in a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def cuts_tokens(self) -> bool:
        """Whether a tp rank has its own tokens alone between the linears."""
        return self.sequence_parallel and not self._whole.now

    @property
    def gathers(self) -> bool:
        """Whether activations outside the linears are cut over the tokens."""
        return self.cuts_tokens and self.tp.size > 1

    def own_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's tokens of x [F, ...] under sequence parallelism, else all: [T, ...], a view."""
        return local_tokens(x, self.tp) if self.cuts_tokens else x
