"""What a block of one layer is built from: it makes the layer's parallel linears and norms under their names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megalora.adapters.config import ResolvedLora
from megalora.adapters.sharing import holder
from megalora.models import spec
from megalora.models.blocks.norm import NORMS, Norm, NormAcrossHeads, NormOfEachHead
from megalora.models.names import Stem, below, hang
from megalora.ops.dropout import named_site
from megalora.parallel.experts import ExpertLinear, ReplicatedLinear, SharedFactors
from megalora.parallel.linear import ColumnParallelLinear, RowParallelLinear, TokenLinear
from megalora.parallel.placement import Placement
from megalora.parallel.split import Cut, Part, Split, joined_cut

# The layer's inputs to adapted linears, each with its own dropout mask. Numbers of existing runs never move: a new kind
# of input gets a number from a stable hash of its name (docs/design.md).
SITES = ("qkv", "out", "up", "down")


@dataclass(frozen=True)
class LayerPlace:
    """Layer `index` of a stack: its parameters are registered below `root`.

    recompute  what of the layer runs again in backward, one of choices.RECOMPUTE_LEVELS
    tile       tokens at once where what treats every token alone runs again; 0: all
    offloads   what of the layer is kept instead is kept in host memory
    """

    root: nn.Module
    stack: spec.Stack
    index: int
    place: Placement
    lora: ResolvedLora
    recompute: str = "none"
    tile: int = 0
    offloads: bool = False

    def site(self, name: str) -> int:
        """Return the dropout site of the layer's input `name`: by SITES, or by a hash of the full name."""
        if name in SITES:
            return len(SITES) * self.index + SITES.index(name)
        return named_site(self.stack.of_layer(self.index, name))

    def column(self, linear: spec.Linear, cut: Cut | Part) -> ColumnParallelLinear:
        """Build a column-parallel linear of this rank's out_features `cut`."""
        return self._linear(ColumnParallelLinear, linear, cut)

    def row(self, linear: spec.Linear, part: Part) -> RowParallelLinear:
        """Build a row-parallel linear of this rank's in_features `part`."""
        return self._linear(RowParallelLinear, linear, part)

    def expert(self, linear: spec.Linear) -> ExpertLinear:
        """Build a linear of an expert that this rank holds."""
        return self._linear(ExpertLinear, linear)

    def share_factors(self, linears: Sequence[ExpertLinear], factors: str) -> None:
        """Let the same linears of this rank's experts, where they are adapted, have the `factors` of all experts."""
        if linears[0].adapter is not None:
            name = holder(linears[0].name, factors[0], self.lora.config.expert_lora)
            hang(self.root, name, SharedFactors(name, linears, factors, self.place))

    def token(self, linear: spec.Linear) -> TokenLinear:
        """Build a linear that every rank holds whole, for its own tokens."""
        return self._linear(TokenLinear, linear)

    def replicated(self, linear: spec.Linear) -> ReplicatedLinear:
        """Build a linear that every rank holds whole, and whose gradients are terms of a sum over tp."""
        return self._linear(ReplicatedLinear, linear)

    def parameter(self, name: str, parameter: nn.Parameter, split: Split | None = None) -> None:
        """Register a parameter of the layer that is neither linear nor norm, beside the module that has its stem.

        split  where it is cut, of a stem that is no module of its own
        """
        *path, last = self.stack.of_layer(self.index, name).split(".")
        stem = below(self.root, path)
        stem.register_parameter(last, parameter)
        if split is not None:
            assert isinstance(stem, Stem), name
            stem.splits[last] = split

    def frozen(self, name: str, shape: tuple[int, ...], cut: Cut, dtype: torch.dtype) -> nn.Parameter:
        """Build and register a frozen parameter of the layer of which this rank has rows `cut`."""
        split = cut.split(shape, 0)
        found = nn.Parameter(torch.empty(split.local_shape, dtype=dtype, device=self.place.device), requires_grad=False)
        self.parameter(name, found, split)
        return found

    def columns(self, outputs: list[tuple[str, spec.Projection, Part]]) -> tuple[ColumnParallelLinear, ...]:
        """Build the linears of several outputs: (name, what makes it, this rank's units of it) each.

        Units are heads where the linear is fused by heads, else features; outputs of one Fused stand side by side.
        """
        found = []
        for made, own in itertools.groupby(outputs, key=lambda output: output[1]):
            if isinstance(made, spec.Linear):
                found += [self.column(made, part) for _, _, part in own]
                continue
            rows = made.rows
            parts = [(part, rows.unit(name), rows.pieces(name, part.start, part.stop)) for name, _, part in own]
            found.append(self.column(made.linear, joined_cut(parts)))
        assert len({linear.name for linear in found}) == len(found), outputs
        return tuple(found)

    def module(self, name: str, module: nn.Module) -> None:
        """Register a module of the layer that is no linear."""
        hang(self.root, self.stack.of_layer(self.index, name), module)

    def norm(self, norm: spec.Norm) -> Norm:
        """Build a norm of the layer."""
        module = NORMS[norm.kind](norm, self.place)
        self.module(norm.name, module)
        return module

    def head_norm(self, norm: spec.Norm, head_dim: int, heads: Part, copies: list[int]) -> Norm:
        """Build a norm of q or k [F, heads, head_dim] of this rank's `heads`, each of which `copies` ranks hold."""
        if norm.heads:
            of_heads = NormOfEachHead(norm, self.place, heads)
            module: Norm = of_heads
            for head, one in of_heads.apart.items():
                self.module(f"{norm.name}.{head}", one)
            if norm.apart:
                return module
        elif norm.size != head_dim:
            module = NormAcrossHeads(norm, self.place, heads.times(head_dim), copies)
        else:
            return self.norm(norm)
        self.module(norm.name, module)
        return module

    def _linear(self, kind: type, linear: spec.Linear, *cut: Cut | Part):
        name = self.stack.of_layer(self.index, linear.name)
        module = kind(
            name, linear.in_features, linear.out_features, *cut, bias=linear.bias, adapter=self.lora.adapter(name),
            trains_bias=self.lora.trains_bias(name), place=self.place, transposed=linear.transposed,
        )  # fmt: skip
        hang(self.root, name, module)
        return module
