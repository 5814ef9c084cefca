"""Gated short convolutions (LFM2): their inputs column-parallel by channels, the output row-parallel, and the
convolution cut by the same channels.

Legend: T tokens on this rank, F tokens of the microbatch, C channels of this rank, W tokens of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalora.models import spec
from megalora.models.blocks.mlp import INNER_STEP
from megalora.models.blocks.place import LayerPlace
from megalora.models.blocks.recurrent import RecurrentBlock
from megalora.models.inputs import States
from megalora.ops.delta_rule import Documents
from megalora.ops.short_convolution import behind_kept, gated_convolution
from megalora.parallel.group import LinearGroup
from megalora.parallel.split import even_part


class GatedConvolutionBlock(RecurrentBlock):
    """reduces: of the output, as LinearGroup takes it."""

    def __init__(self, mixer: spec.GatedConvolution, at: LayerPlace, reduces: bool = True):
        self.layer = at.index
        part = even_part(mixer.channels, at.place.tp, INNER_STEP)
        self.inputs = LinearGroup(at.columns([(name, mixer.made, part) for name in "bcx"]), at.site("qkv"), at.place)
        self.output = LinearGroup((at.row(mixer.out, part),), at.site("out"), at.place, reduces=reduces)
        weight, *bias = (at.frozen(name, shape, part.cut(), at.place.dtype) for name, shape in mixer.tensors())
        self.weight, self.bias = weight, bias[0] if bias else None

    def mixed(self, y: torch.Tensor, documents: Documents) -> torch.Tensor:
        return gated_convolution(y, self.weight.squeeze(1), self.bias, documents.ages)

    # ---- generation (megalora.models.inputs.Recurrent): what is kept are the last y [B, W - 1, 3 C]

    def nothing(self, count: int, like: torch.Tensor) -> States:
        """Return what `count` sequences without tokens leave; like: y."""
        channels, _, width = self.weight.shape
        return (like.new_zeros(count, width - 1, 3 * channels),)

    def continued(
        self, y: torch.Tensor, bounds: Sequence[int], documents: Documents, kept: States
    ) -> tuple[torch.Tensor, States]:
        """Return the results [F, C] of y [F, 3 C], the next tokens of several sequences, and what they leave."""
        (whole, left), before = behind_kept(kept[0], y, bounds), kept[0].shape[1]
        made = [gated_convolution(one, self.weight.squeeze(1), self.bias, None)[before:] for one in whole]
        return torch.cat(made), (left,)

    def step(self, y: torch.Tensor, kept: States, slots: torch.Tensor, idle: int | None) -> torch.Tensor:
        """Return the results of one token of each sequence and bring what their slots keep forward, in place."""
        seen = torch.cat([kept[0][slots], y.unsqueeze(1)], 1)
        kept[0][slots] = seen[:, 1:]
        wide = torch.promote_types(y.dtype, torch.float32)
        b, c, x = seen.to(wide).chunk(3, -1)
        made = (b * x * self.weight.squeeze(1).t()).sum(1)
        made = made if self.bias is None else made + self.bias
        return (c[:, -1] * made).to(y.dtype)

    @property
    def steps_alike(self) -> bool:
        """Return True: the few operations of `step` are those of any tokens."""
        return True
