"""The encoder of an encoder-decoder on one stage: its part of the layers, and its ends where they are here.

Between stages a message has the encoder's tokens and behind them the decoder's: what the encoder leaves (its memory)
rides along to every decoder layer, and its gradient comes back with theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from megalora.models import spec
from megalora.models.blocks.ends import EmbeddingBlock
from megalora.models.blocks.layer import Layer
from megalora.models.blocks.norm import NORMS
from megalora.models.blocks.prefix import PrefixBlock
from megalora.models.inputs import Inputs
from megalora.models.names import hang
from megalora.models.recompute import Recomputer
from megalora.ops.dropout import drop, named_site
from megalora.parallel.embedding import VocabParallelEmbedding
from megalora.parallel.placement import Placement


class EncoderBlock:
    """layers: of the stage, of which the encoder's are taken. words: on the first stage, of the model's embedding."""

    def __init__(
        self,
        root: nn.Module,
        encoder: spec.Encoder,
        layers: Mapping[int, Layer],
        place: Placement,
        words: VocabParallelEmbedding | None,
        prefix: PrefixBlock | None = None,
    ):
        self.spec, self.layers = encoder, {i: layer for i, layer in layers.items() if i < encoder.count}
        self._embedding = self._norm = None
        if words is not None:
            self._embedding = EmbeddingBlock(root, encoder.embedding, place, words, "encoder embedding", prefix)
        if encoder.final_norm is not None and encoder.count - 1 in self.layers:
            self._norm = NORMS[encoder.final_norm.kind](encoder.final_norm, place)
            hang(root, encoder.final_norm.name, self._norm)

    def __call__(
        self, hidden: torch.Tensor | None, inputs: Inputs, layers: Sequence[int], recomputer: Recomputer
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (the encoder's stream [S, hidden_size] behind `layers`, the decoder's as it came [T, hidden_size]).

        hidden  [S + T, hidden_size] from the stage before; None on the first, where the decoder's is None too
        layers  by their index in the model, of which those of the encoder run
        """
        source, stream, target, delta = inputs.source, None, None, None
        assert source is not None
        if hidden is not None:
            stream, target = hidden.split([len(source.tokens.local), len(inputs.tokens.local)])
        else:
            assert self._embedding is not None
            stream = self._embedding(source)
        own = [i for i in layers if i in self.layers]
        for i in own:
            stream, delta = self.layers[i](stream, delta, source, recomputer)
        if self.spec.count - 1 not in own:
            return stream if delta is None else stream + delta, target
        if self._norm is not None:
            stream = self._norm.after(stream, delta)[1]
        elif delta is not None:
            stream = stream + delta
        draw = source.tokens.draw(self.spec.dropout, named_site("encoder final norm"))
        return drop(stream, source.tokens.local, draw), target
