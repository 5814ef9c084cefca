"""The head of a classifier: its last linear is trained in full, and whole on every rank (see spec.ClassHead).

Every tensor-parallel rank computes the same scores, of the labelled tokens alone, so that no gradient is a partial sum.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from megalora.batch import to_device
from megalora.models import spec
from megalora.models.blocks.norm import NORMS
from megalora.models.inputs import Inputs
from megalora.models.names import hang
from megalora.ops.activations import ACTIVATIONS
from megalora.ops.dropout import drop, named_site
from megalora.parallel.collectives import all_gather, local_tokens
from megalora.parallel.placement import Placement
from megalora.parallel.split import Split, whole_split

_DEVIATION = 0.02  # of the initial weights: transformers' initializer_range


class WholeLinear(nn.Module):
    """y = x W^T + b, whole on every rank; trained in full, or frozen."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: spec.Linear, trained: bool, place: Placement):
        super().__init__()
        self.name, self._place, self._shapes = linear.name, place, dict(linear.tensors())
        dtype = place.master_dtype if trained else place.dtype
        self.register_parameter("bias", None)
        for name, shape in self._shapes.items():
            values = torch.empty(shape, dtype=dtype, device=place.device)
            self.register_parameter(name.rpartition(".")[2], nn.Parameter(values, requires_grad=trained))

    def shard_dims(self) -> dict[str, Split]:
        shapes = self._shapes.items()
        return {name.rpartition(".")[2]: whole_split(shape, self._place.tp) for name, shape in shapes}

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Fill a trained linear with its initial values, the same on every layout: normal weights, no bias."""
        digest = hashlib.sha256(f"{seed} {self.name}.weight".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.randn(self.weight.shape, dtype=torch.float64, generator=generator) * _DEVIATION
        self.weight.copy_(values)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


class ClassScores:
    """The head of a classifier on the last stage: its parameters are registered below `root`."""

    def __init__(self, root: nn.Module, head: spec.ClassHead, place: Placement):
        self.spec, self.place = head, place
        self.linears = [WholeLinear(linear, head.trains(linear), place) for linear in head.linears]
        for linear in self.linears:
            hang(root, linear.name, linear)
        self._norm = None if head.norm is None else NORMS[head.norm.kind](head.norm, place)
        if head.norm is not None:
            hang(root, head.norm.name, self._norm)

    @property
    def words(self) -> ClassScores:
        """What the task's loss takes: as HeadBlock's."""
        return self

    def reads(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the final hidden states as they are: as HeadBlock's."""
        return hidden

    @property
    def labels(self) -> tuple[str, ...]:
        return self.spec.labels

    def reset(self, seed: int) -> None:
        """Fill what is trained with its initial values."""
        for linear in self.linears:
            if linear.weight.requires_grad:
                linear.reset(seed)

    def __call__(self, hidden: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return the scores of the labelled tokens, [L, classes] in the dtype of the masters, the same on every rank.

        hidden  [T, hidden_size], the final hidden states: this rank's tokens under sequence parallelism, else all
        """
        x = _Labelled.apply(hidden, inputs.labelled, self.place, inputs.bounds if self.spec.means else None)
        index = inputs.tokens.index[inputs.labelled]
        *dense, out = self.linears
        for linear in dense:
            x = self._dropped(x, index, inputs, self.spec.input_dropout, f"{linear.name} input")
            x = _activated(self.spec.act, linear(x))
            x = x if self._norm is None else self._norm(x)
        return out(self._dropped(x, index, inputs, self.spec.dropout, f"{out.name} input"))

    def _dropped(self, x: torch.Tensor, index: torch.Tensor, inputs: Inputs, p: float, site: str) -> torch.Tensor:
        return drop(x, index, inputs.tokens.draw(p, named_site(site)))


def _activated(act: str, x: torch.Tensor) -> torch.Tensor:
    return x.tanh() if act == "tanh" else ACTIVATIONS[act](x)


class _Labelled(torch.autograd.Function):
    """The labelled rows of all ranks' hidden states; bounds: of documents, of which the rows are the means, or None.

    Their gradient is the same on every rank, which takes its own.
    """

    @staticmethod
    def forward(ctx, hidden, labelled, place, bounds):
        full = all_gather(hidden, place.tp) if place.gathers else hidden
        ctx.place, ctx.tokens, lengths = place, full.shape[0], None
        if bounds is not None:  # documents take the place of tokens
            ends = to_device(torch.tensor(bounds[1:]), full.device)
            lengths, labelled = ends.diff(prepend=ends.new_zeros(1)), torch.searchsorted(ends, labelled, right=True)
            full = torch.segment_reduce(full.to(place.master_dtype), "mean", lengths=lengths, unsafe=True)
        ctx.save_for_backward(labelled, lengths)
        ctx.rows, ctx.dtype = full.shape[0], hidden.dtype
        return full.index_select(0, labelled)

    @staticmethod
    def backward(ctx, dx):
        labelled, lengths = ctx.saved_tensors
        dfull = dx.new_zeros(ctx.rows, dx.shape[1]).index_copy_(0, labelled, dx)
        if lengths is not None:
            dfull = (dfull / lengths[:, None]).repeat_interleave(lengths, 0, output_size=ctx.tokens).to(ctx.dtype)
        return local_tokens(dfull, ctx.place.tp) if ctx.place.gathers else dfull, None, None, None
