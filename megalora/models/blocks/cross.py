"""Cross attention: q of the decoder's tokens, k and v of the encoder's, column-parallel by heads; the output
row-parallel.

Legend: T and S tokens of decoder and encoder on this rank, F and G all of a microbatch, H heads of this rank, D
head_dim.
"""

from __future__ import annotations

import torch

from megalora.models import spec
from megalora.models.blocks.place import LayerPlace
from megalora.models.inputs import Inputs
from megalora.ops.cross_attention import cross_attention
from megalora.ops.probability_dropout import draw_probabilities
from megalora.parallel.group import LinearGroup
from megalora.parallel.group_grad import apply_group
from megalora.parallel.split import cut_heads


class CrossAttentionBlock:
    """reduces: of the output, as LinearGroup takes it."""

    def __init__(self, attention: spec.CrossAttention, at: LayerPlace, reduces: bool = True):
        self.layer, self.spec = at.index, attention
        own = cut_heads(attention.heads, attention.heads, at.place.tp).query
        part = own.times(attention.head_dim)
        self.q = LinearGroup((at.column(attention.q, part),), at.site("cross.q"), at.place)
        kv = (at.column(attention.k, part), at.column(attention.v, part))
        self.kv = LinearGroup(kv, at.site("cross.kv"), at.place)
        self.output = LinearGroup((at.row(attention.out, part),), at.site("cross.out"), at.place, reduces=reduces)
        self.scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
        sites = [at.site(f"{attention.out.name}.probabilities.{head}") for head in range(own.start, own.stop)]
        self.sites = torch.tensor(sites, device=at.place.device)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.q, self.kv, self.output

    @property
    def room(self) -> int:
        """Columns that are wanted behind the input."""
        return self.q.room

    def __call__(self, X: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """X [T, hidden_size + room] -> [T, hidden_size]; it reads inputs.memory [S, hidden_size]."""
        tokens = inputs.tokens
        q = apply_group(self.q, X, tokens).unflatten(-1, (-1, self.spec.head_dim))
        if inputs.cache is not None:
            k, v = (None, None) if inputs.memory is None else self._keys(inputs)
            context = inputs.cache.cross(self.layer, q, k, v, self.scale)
            return apply_group(self.output, context.flatten(1), tokens)
        k, v = self._keys(inputs)
        crossing, source = inputs.crossing, inputs.source
        assert crossing is not None and source is not None
        dropout = draw_probabilities(tokens.draw(self.spec.dropout, 0), self.sites, tokens.index, source.tokens.index)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return cross_attention(q, k, v, crossing, self.scale, dropout)

        context = inputs.attend(attend, q, k, v)
        return apply_group(self.output, context.flatten(1), tokens)

    def _keys(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k, v [G, H, D] of what the encoder left."""
        assert inputs.memory is not None and inputs.source is not None
        kv = apply_group(self.kv, inputs.memory, inputs.source.tokens)
        k, v = kv.unflatten(-1, (2, -1, self.spec.head_dim)).unbind(1)
        return k, v
