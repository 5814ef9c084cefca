"""One layer: its mixers, each behind a norm, and how they are added to the residual stream.

The stream is hidden + delta, both [T, hidden_size] (delta None: nothing to add), in and out: sums are left to the norm
that reads them, and so is what is done to delta before (Ending), where steps are linked.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import nn

from megalora.models import spec
from megalora.models.blocks.attention import AttentionBlock
from megalora.models.blocks.convolution import GatedConvolutionBlock
from megalora.models.blocks.cross import CrossAttentionBlock
from megalora.models.blocks.delta import DeltaAttentionBlock
from megalora.models.blocks.ending import BaseDropout, Ending
from megalora.models.blocks.experts import ExpertsBlock
from megalora.models.blocks.latent import LatentAttentionBlock
from megalora.models.blocks.mamba import StateSpaceBlock
from megalora.models.blocks.mlp import MLPBlock
from megalora.models.blocks.norm import Norm
from megalora.models.blocks.place import LayerPlace
from megalora.models.blocks.recurrent import RecurrentBlock
from megalora.models.inputs import Inputs
from megalora.models.recompute import Part, Recomputer, Stream, made_again
from megalora.ops.step_linear import is_step
from megalora.parallel.experts import ExpertGroup
from megalora.parallel.group import LinearGroup
from megalora.parallel.group_grad import reduce_terms

Block = AttentionBlock | CrossAttentionBlock | LatentAttentionBlock | MLPBlock | ExpertsBlock | RecurrentBlock
_ONE_INPUT = AttentionBlock | RecurrentBlock | MLPBlock  # whose first group alone reads what the norm gives
BLOCKS = {
    spec.Attention: AttentionBlock,
    spec.CrossAttention: CrossAttentionBlock,
    spec.DeltaAttention: DeltaAttentionBlock,
    spec.GatedConvolution: GatedConvolutionBlock,
    spec.StateSpace: StateSpaceBlock,
    spec.LatentAttention: LatentAttentionBlock,
    spec.MLP: MLPBlock,
    spec.Experts: ExpertsBlock,
}


class Layer:
    """The steps of one layer, one after another."""

    def __init__(self, layer: spec.Layer, at: LayerPlace):
        kinds = {spec.Residual: _Step, spec.ParallelResidual: _ParallelStep}
        self.steps = [kinds[type(step)](step, at) for step in layer]
        self._offloads = at.offloads
        self._parts = [(False, Part((step,), at.tile)) for step in self.steps]  # (whether it is computed again, what)
        if at.recompute in ("layer", "full"):
            self._parts = [(True, Part(tuple(self.steps), at.tile, at.recompute == "layer"))]
        elif at.recompute == "mlp":
            self._parts = [(part.steps[0].by_token, part) for _, part in self._parts]

    @property
    def blocks(self) -> list[Block]:
        return [block for step in self.steps for block in step.blocks]

    @property
    def is_made_again(self) -> bool:
        """Whether any of it is computed again in backward, as a part of its own."""
        return any(again for again, _ in self._parts)

    @property
    def groups(self) -> list[LinearGroup | ExpertGroup]:
        """Its linears, in groups that read one input, in order of computation."""
        return [group for step in self.steps for group in step.groups]

    def __call__(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs, recomputer: Recomputer | None = None
    ) -> Stream:
        """Run it. recomputer: of the microbatch, where parts of the layer are to be computed again in its backward."""
        for again, part in self._parts:
            if again and recomputer is not None and torch.is_grad_enabled():
                hidden, delta = recomputer.run(part, hidden, delta, inputs, self._offloads)
            else:
                for step in part.steps:
                    hidden, delta = step(hidden, delta, inputs)
        return hidden, delta


def link(layers: Sequence[Layer]) -> None:
    """Let each step of these layers, which run one after another, leave its ending to the norm of the next."""
    steps = [(step, layer.is_made_again) for layer in layers for step in layer.steps]
    for (step, again), (following, again_then) in itertools.pairwise(steps):
        if step.sums_first and following.norm is not None and not (again or again_then):
            step.leaves, following.before = True, step.ending


class _Step:
    """x -> total * post_norm(x + dropout(scale * output_norm(mixer(norm(x))))).

    ending  what is done to the mixer's result before it is added; where the step `leaves` it, the next one does it
    before  the ending that the step before leaves
    """

    def __init__(self, step: spec.Residual, at: LayerPlace):
        self.norm = None if step.norm is None else at.norm(step.norm)
        self.blocks = [BLOCKS[type(step.mixer)](step.mixer, at)]
        output_norm = None if step.output_norm is None else at.norm(step.output_norm)
        self.post_norm = None if step.post_norm is None else at.norm(step.post_norm)
        dropout = BaseDropout(step.dropout, at.site(f"{_last(step.mixer)}.residual"))
        self.ending, self.leaves = Ending(output_norm, step.scale, dropout), False
        self.before: Ending | None = None
        self.by_token = isinstance(self.blocks[0], MLPBlock) and self.post_norm is None
        self.total = _total(step, at)
        self.sums_first = self.post_norm is None and self.total is None
        self.reads_result = output_norm is not None or self.post_norm is not None or step.dropout > 0
        self._makes_again = at.recompute in ("norms", "mlp") and isinstance(self.blocks[0], _ONE_INPUT)

    @property
    def groups(self) -> list[LinearGroup | ExpertGroup]:
        return [group for block in self.blocks for group in block.groups]

    def __call__(self, hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs) -> Stream:
        (block,) = self.blocks
        again: contextlib.AbstractContextManager = contextlib.nullcontext()
        if (stepped := self._stepped(hidden, delta, inputs)) is not None:
            hidden, added = stepped
        else:
            if self.norm is None:
                hidden = x = hidden if delta is None else hidden + delta
            else:
                hidden, x = self.norm.after(hidden, delta, block.room, self.before, inputs)
                if self._makes_again and torch.is_grad_enabled():
                    again = made_again(x, functools.partial(self._normed, hidden.detach(), inputs))
            with again:
                added = block(x, inputs)
        if self.post_norm is not None:
            hidden, added = self.post_norm.after(hidden, added, 0, self.ending, inputs)[1], None
        elif not self.leaves:
            added = self.ending(added, inputs)
        if self.total is None:
            return hidden, added
        return (hidden if added is None else hidden + added) * self.total, None

    def _stepped(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (the stream, the block's result) of a step of generation whose kernels norm what they read; None where
        there are none."""
        (block,) = self.blocks
        if inputs.cache is None or self.norm is None or not is_step(hidden):
            return None
        if not isinstance(block, AttentionBlock | MLPBlock):
            return None
        if delta is not None and self.before is not None and not self.before.addend(inputs).plain:
            return None
        return block.of_sum(hidden, delta, self.norm.weights, inputs)

    @torch.no_grad()
    def _normed(self, total: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """Return what the block read of the stream, with z behind it."""
        (block,) = self.blocks
        x = self.norm(total, block.room)
        block.groups[0].fill_room(x, inputs.tokens)
        return x


class _ParallelStep:
    """x -> total * (x + output_norm(the sum over branches of scale * mixer(norm(x)))), which are reduced over tp
    together, or each before the norm of its result.

    Branches that share a norm read its one result; the first has room behind it.
    """

    by_token, reads_result = False, True

    def __init__(self, step: spec.ParallelResidual, at: LayerPlace):
        self.place, self.leaves, self.total = at.place, False, _total(step, at)
        self.sums_first = self.total is None
        self.before: Ending | None = None
        shared: dict[spec.Norm, Norm] = {}
        for branch in step.branches:
            plain = branch.post_norm is None and branch.total is None
            assert branch.norm is not None and plain, branch
            if branch.norm not in shared:
                shared[branch.norm] = at.norm(branch.norm)
        self.norms = [shared[branch.norm] for branch in step.branches]
        self.output_norms = [None if b.output_norm is None else at.norm(b.output_norm) for b in step.branches]
        self.together = at.place.tp.size > 1 and not any(self.output_norms)
        reduces = not self.together
        assert not any(self.output_norms) or not any(b.dropout for b in step.branches), step
        self.blocks = [BLOCKS[type(branch.mixer)](branch.mixer, at, reduces=reduces) for branch in step.branches]
        self.norm = self.norms[0]
        self.scales = [b.scale for b in step.branches]
        assert self.scales == [1.0] * len(self.scales) or not any(self.output_norms), step
        self.dropouts = [BaseDropout(b.dropout, at.site(f"{_last(b.mixer)}.residual")) for b in step.branches]
        output_norm = None if step.output_norm is None else at.norm(step.output_norm)
        self.ending = Ending(output_norm, 1.0, BaseDropout(step.dropout, at.site("residual")))

    @property
    def groups(self) -> list[LinearGroup | ExpertGroup]:
        return [group for block in self.blocks for group in block.groups]

    def __call__(self, hidden: torch.Tensor, delta: torch.Tensor | None, inputs: Inputs) -> Stream:
        total, size = None, hidden.shape[-1]
        normed: dict[Norm, torch.Tensor] = {}
        parts = zip(self.norms, self.blocks, self.dropouts, self.output_norms, self.scales, strict=True)
        for norm, block, dropout, behind, scale in parts:
            if norm in normed:
                x = normed[norm][..., :size]
            else:
                hidden, x = norm.after(hidden, delta, block.room, self.before, inputs)
                normed[norm], delta = x, None
            term = dropout.whole(block(x, inputs), inputs)
            term = term if behind is None else behind(term)
            term = term if scale == 1.0 else term * scale
            total = term if total is None else total + term
        if self.together:
            total = reduce_terms(total, self.place, self._biases(inputs))
        total = total if self.leaves else self.ending(total, inputs)
        return (hidden, total) if self.total is None else ((hidden + total) * self.total, None)

    def _biases(self, inputs: Inputs) -> list[torch.Tensor | None]:
        """Return the biases of the branches' outputs, which no term has: [O], or with dropout [T, O]."""
        tokens = len(inputs.tokens.local)
        biases = []
        for block, scale in zip(self.blocks, self.scales, strict=True):
            assert not isinstance(block, ExpertsBlock) or block.shared is None or block.shared.output.bias is None
            bias = None if isinstance(block, ExpertsBlock) else block.output.bias
            biases.append(bias if bias is None or scale == 1.0 else bias * scale)
        return [
            bias
            if bias is None or dropout.draw(inputs) is None
            else dropout.local(bias.expand(tokens, -1).contiguous(), inputs)
            for bias, dropout in zip(biases, self.dropouts, strict=True)
        ]


def _total(step: spec.Residual | spec.ParallelResidual, at: LayerPlace) -> nn.Parameter | None:
    """Build the number that the stream behind a step is multiplied by."""
    if step.total is None:
        return None
    one = nn.Parameter(torch.empty(1, dtype=at.place.dtype, device=at.place.device), requires_grad=False)
    at.parameter(step.total, one)
    return one


def _last(mixer: spec.Mixer) -> str:
    """Return the name of the linear whose result is added."""
    if isinstance(mixer, spec.Experts):
        return "experts"
    return mixer.down.name if isinstance(mixer, spec.MLP) else mixer.out.name
