"""Linear attention by the gated delta rule: its inputs column-parallel by key heads, with the value heads that read
them, the output row-parallel. Its convolution, decay and bias are cut by the same heads.

Legend: T tokens on this rank, F tokens of the microbatch, O features of all inputs of this rank, H its value heads, V
features of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalora.models import spec
from megalora.models.blocks.place import LayerPlace
from megalora.models.blocks.recurrent import RecurrentBlock
from megalora.models.inputs import States
from megalora.ops.delta_mixer import (
    DeltaWeights,
    Heads,
    Kept,
    continued_delta_mixer,
    delta_mixer,
    delta_mixer_step,
    takes_step,
)
from megalora.ops.delta_rule import Documents
from megalora.parallel.group import LinearGroup
from megalora.parallel.split import even_part, joined_cut


class DeltaAttentionBlock(RecurrentBlock):
    """reduces: of the output, as LinearGroup takes it."""

    def __init__(self, delta: spec.DeltaAttention, at: LayerPlace, reduces: bool = True):
        self.layer = at.index
        part = even_part(delta.groups, at.place.tp)
        self.heads = Heads(part.size, delta.repeats, delta.key, delta.value)
        inputs = at.columns([
            (name, made, part if isinstance(made, spec.Fused) else part.times(delta.rows[name]))
            for name, made in delta.projections.items()
        ])  # fmt: skip
        values = part.times(delta.repeats)
        self.inputs = LinearGroup(inputs, at.site("qkv"), at.place)
        out = at.row(delta.out, values.times(delta.value))
        self.output = LinearGroup((out,), at.site("out"), at.place, reduces=reduces)
        channels = delta.channels
        places = [(part, channels.unit(name), channels.pieces(name, part.start, part.stop)) for name in "qkv"]
        cuts = [joined_cut(places), values.cut(), values.cut()]
        wide = torch.promote_types(at.place.dtype, torch.float32)
        dtypes = at.place.dtype, wide, wide
        frozen = [
            at.frozen(name, shape, cut, dtype)
            for (name, shape), cut, dtype in zip(delta.tensors(), cuts, dtypes, strict=True)
        ]
        self.convolution, self.decay, self.bias = frozen
        self.norm = at.norm(delta.norm)

    @property
    def weights(self) -> DeltaWeights:
        return DeltaWeights(self.convolution.squeeze(1), self.decay, self.bias, self.norm.weight, self.norm.eps)

    def mixed(self, y: torch.Tensor, documents: Documents) -> torch.Tensor:
        return delta_mixer(y, self.heads, self.weights, documents)

    # ---- generation (megalora.models.inputs.Recurrent)

    def nothing(self, count: int, like: torch.Tensor) -> Kept:
        """Return what `count` sequences without tokens leave; like: y."""
        return Kept.nothing(count, self.heads, self.weights, like)

    def continued(
        self, y: torch.Tensor, bounds: Sequence[int], documents: Documents, kept: States
    ) -> tuple[torch.Tensor, Kept]:
        """Return the results [F, H V] of y [F, O], the next tokens of several sequences, and what they leave."""
        return continued_delta_mixer(y, self.heads, self.weights, bounds, documents, Kept(*kept))

    def step(self, y: torch.Tensor, kept: States, slots: torch.Tensor, idle: int | None) -> torch.Tensor:
        """Return the results of one token of each sequence and bring what their slots keep forward, in place."""
        return delta_mixer_step(y, self.heads, self.weights, Kept(*kept), slots, idle)

    @property
    def steps_alike(self) -> bool:
        """Whether kernels take `step`."""
        return takes_step(self.convolution.device.type, self.convolution.dtype, self.heads, self.weights)
