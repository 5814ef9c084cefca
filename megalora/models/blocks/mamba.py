"""Mamba-2: its inputs column-parallel by heads, with b and c of the groups that these read, the output row-parallel.
Its convolution, decay, bias, skip and norm are cut by the same heads; a norm of heads of several ranks adds up over
them.

Legend: T tokens on this rank, F tokens of the microbatch, O features of all inputs of this rank, H its heads of P
features, J its groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalora.models import spec
from megalora.models.blocks.place import LayerPlace
from megalora.models.blocks.recurrent import RecurrentBlock
from megalora.models.inputs import States
from megalora.ops.delta_rule import Documents
from megalora.ops.mamba_mixer import (
    Kept,
    MambaWeights,
    Sizes,
    Sums,
    continued_mamba_mixer,
    mamba_mixer,
    mamba_mixer_step,
)
from megalora.parallel.collectives import all_reduce
from megalora.parallel.group import LinearGroup
from megalora.parallel.split import cut_heads, joined_cut


class StateSpaceBlock(RecurrentBlock):
    """reduces: of the output, as LinearGroup takes it."""

    def __init__(self, mixer: spec.StateSpace, at: LayerPlace, reduces: bool = True):
        self.layer, self.spec, self._tp = at.index, mixer, at.place.tp
        cut = cut_heads(mixer.heads, mixer.groups, at.place.tp)
        heads, self._groups = cut.query, cut.kv
        self.sizes = Sizes(heads.size, cut.kv.size, mixer.features, mixer.state)
        parts = {"z": heads, "x": heads, "b": cut.kv, "c": cut.kv, "dt": heads}
        inputs = at.columns([(name, mixer.made, part) for name, part in parts.items()])
        self.inputs = LinearGroup(inputs, at.site("qkv"), at.place)
        inner = heads.times(mixer.features)
        self.output = LinearGroup(
            (at.row(mixer.out, inner),), at.site(f"{mixer.out.name} input"), at.place, reduces=reduces
        )
        channels = mixer.channels
        places = [(parts[name], channels.unit(name), channels.pieces(name, parts[name].start, parts[name].stop))
                  for name in "xbc"]  # fmt: skip
        wide = torch.promote_types(at.place.dtype, torch.float32)
        of_channels = 1 + mixer.convolution_biased
        frozen = [
            at.frozen(name, shape, joined_cut(places), at.place.dtype)
            if i < of_channels
            else at.frozen(name, shape, heads.cut(), wide)
            for i, (name, shape) in enumerate(mixer.tensors())
        ]
        self.convolution, self.convolution_bias = frozen[0], frozen[1] if mixer.convolution_biased else None
        self.decay, self.bias, self.skip = frozen[of_channels:]
        self.norm = None
        if mixer.norm is not None:
            self.norm = at.frozen(f"{mixer.norm.name}.weight", (mixer.norm.size,), inner.cut(), at.place.dtype)

    @property
    def weights(self) -> MambaWeights:
        z, *scales, dt = self.spec.scales
        convolution, norm = self.convolution.squeeze(1), self.spec.norm
        if any(scale != 1.0 for scale in scales):  # of what the convolution reads
            parts = convolution.to(self.decay.dtype).split(self.sizes.widths[1:4])
            convolution = torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)])
        return MambaWeights(
            convolution,
            self.convolution_bias,
            self.decay,
            self.bias,
            self.skip,
            self.norm,
            0.0 if norm is None else norm.eps,
            self.spec.heads * self.spec.features // self.spec.groups,
            z,
            dt,
        )

    @property
    def sums(self) -> Sums | None:
        """What adds up [F, J] over the ranks that hold heads of the same groups; None where no group has several."""
        return self._summed if self._groups.shared else None

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        own = slice(self._groups.start, self._groups.stop)
        whole = x.new_zeros(len(x), self.spec.groups)
        whole[:, own] = x
        return all_reduce(whole, self._tp)[:, own]

    def mixed(self, y: torch.Tensor, documents: Documents) -> torch.Tensor:
        return mamba_mixer(y, self.sizes, self.weights, documents, self.sums)

    # ---- generation (megalora.models.inputs.Recurrent)

    def nothing(self, count: int, like: torch.Tensor) -> States:
        """Return what `count` sequences without tokens leave; like: y."""
        return Kept.nothing(count, self.sizes, self.weights, like)

    def continued(
        self, y: torch.Tensor, bounds: Sequence[int], documents: Documents, kept: States
    ) -> tuple[torch.Tensor, States]:
        """Return the results [F, H P] of y [F, O], the next tokens of several sequences, and what they leave."""
        return continued_mamba_mixer(y, self.sizes, self.weights, bounds, documents, Kept(*kept), self.sums)

    def step(self, y: torch.Tensor, kept: States, slots: torch.Tensor, idle: int | None) -> torch.Tensor:
        """Return the results of one token of each sequence and bring what their slots keep forward, in place."""
        return mamba_mixer_step(y, self.sizes, self.weights, Kept(*kept), slots, self.sums)

    @property
    def steps_alike(self) -> bool:
        """Return True: the operations of `step` are those of any tokens."""
        return True
