"""A causal language model, or the part of it that one pipeline stage holds: parts of other stages are None.

Parameter names are those of the HF file, with global layer indices on every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.choices import RECOMPUTE_LEVELS
from megalora.models import spec
from megalora.models.blocks.attention import AttentionBlock
from megalora.models.blocks.classes import ClassScores
from megalora.models.blocks.encoder import EncoderBlock
from megalora.models.blocks.ends import EmbeddingBlock, HeadBlock, words_of
from megalora.models.blocks.experts import ExpertsBlock
from megalora.models.blocks.latent import LatentAttentionBlock
from megalora.models.blocks.layer import Layer, link
from megalora.models.blocks.norm import NORMS, Norm
from megalora.models.blocks.place import LayerPlace
from megalora.models.blocks.prefix import KEPT_BYTES, PrefixBlock, ReadPicture
from megalora.models.graphs import LayerGraphs
from megalora.models.inputs import Inputs, Recurrent
from megalora.models.names import hang
from megalora.models.offload import HostMemory
from megalora.models.recompute import TILE, Recomputer
from megalora.models.spec import ClassHead, ModelSpec
from megalora.ops.dropout import drop, named_site
from megalora.parallel.base import FrozenMatrix
from megalora.parallel.decomposition import Decomposition, settle_norms
from megalora.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from megalora.parallel.experts import ExpertGroup, SharedFactors
from megalora.parallel.group import LinearGroup
from megalora.parallel.linear import ParallelLinear
from megalora.parallel.loss import next_token_loss
from megalora.parallel.placement import Placement
from megalora.parallel.split import Split
from megalora.parallel.trained_words import TrainedEmbedding, TrainedHead

Head = VocabParallelHead | ClassScores
Loss = Callable[[torch.Tensor, Any, Inputs], torch.Tensor]
NO_LORA = ResolvedLora(LoraConfig(), {})


class Stage(nn.Module):
    """Layers `layers` of the model; with `first` the embedding, with `last` the final norm and the head.

    further    the layers of its further chunks, which follow later in the model (interleaved schedules): the embedding
               belongs to the first chunk, the norm and the head to the last
    recompute  what of each layer runs again in backward, one of choices.RECOMPUTE_LEVELS: one for all layers, or
               that of each layer of the model
    tile       tokens at once where what treats every token alone runs again; 0: all
    offloaded  the layers of which what is kept goes to host memory, where they are computed again whole
    loss       (final hidden states, head, inputs) -> the summed loss of a microbatch
    sums       the same -> what an evaluation adds up, where it asks for more than the loss (Inputs.measures)
    Parameters are uninitialised: `checkpoint` fills the base, `reset_adapters` the adapters.
    """

    def __init__(
        self,
        config: ModelSpec,
        layers: Iterable[int],
        place: Placement,
        lora: ResolvedLora = NO_LORA,
        *,
        first: bool = True,
        last: bool = True,
        further: Sequence[Iterable[int]] = (),
        recompute: str | Sequence[str] = "none",
        tile: int = TILE,
        offloaded: Collection[int] = (),
        loss: Loss = next_token_loss,
        sums: Loss | None = None,
    ):
        super().__init__()
        levels = [recompute] * len(config.stack.layers) if isinstance(recompute, str) else recompute
        assert set(levels) <= set(RECOMPUTE_LEVELS), recompute
        self._chunks = tuple(tuple(chunk) for chunk in (layers, *further))
        self.config, self.place, self.lora, self.loss, self.sums = config, place, lora, loss, sums
        self.shares_adapters = False  # whether a token's adapter is looked up in Tokens.adapters
        self._host = HostMemory(place.device) if offloaded else None
        self._graphs: LayerGraphs | None = None
        self._settles = False  # initial magnitudes are to be set
        stack = config.stack
        # Parameters hang below the stage by their names (megalora.models.names), what computes with them is in
        # `_parts`: modules here would be registered a second time.
        words = lora.words(config.embedding.name)
        embedding = prefix = None
        if first and config.prefix is not None:
            prefix = PrefixBlock(self, config.prefix, place)
        if first:
            made = words_of(self, config.embedding, place, words)
            embedding = EmbeddingBlock(self, config.embedding, place, made, prefix=prefix)
        blocks = {
            i: Layer(stack.layers[i], LayerPlace(self, stack, i, place, lora, levels[i], tile, i in offloaded))
            for i in chain(*self._chunks)
        }
        of_encoder = 0 if config.encoder is None else config.encoder.count
        for chunk in self._chunks:
            link([blocks[i] for i in chunk if i < of_encoder])
            link([blocks[i] for i in chunk if i >= of_encoder])
        encoder = None
        if config.encoder is not None:
            shared = None if embedding is None else embedding.words
            encoder = EncoderBlock(self, config.encoder, blocks, place, shared, prefix)
        norm = None
        head: HeadBlock | ClassScores | None = None
        if last and stack.final_norm is not None:
            norm = NORMS[stack.final_norm.kind](stack.final_norm, place)
            hang(self, stack.final_norm.name, norm)
        if last and isinstance(config.head, ClassHead):
            head = ClassScores(self, config.head, place)
        elif last:
            assert isinstance(config.head, spec.Head)
            head = HeadBlock(self, config, place, lora.words(config.head.name), config.head.tied and bool(words.tokens))
        if isinstance(head, HeadBlock) and config.head.tied and embedding is not None:
            _tie(embedding.words, head.words)
        self._parts = _Parts(embedding, encoder, blocks, norm, head)

    @property
    def embedding(self) -> EmbeddingBlock | None:
        return self._parts.embedding

    @property
    def layers(self) -> dict[int, Layer]:
        """The layers by their index in the model."""
        return self._parts.layers

    @property
    def head(self) -> Head | None:
        return None if self._parts.head is None else self._parts.head.words

    @property
    def attentions(self) -> list[AttentionBlock | LatentAttentionBlock]:
        """Every block of self-attention, in order."""
        blocks = (block for layer in self.layers.values() for block in layer.blocks)
        return [block for block in blocks if isinstance(block, AttentionBlock | LatentAttentionBlock)]

    @property
    def recurrent(self) -> list[Recurrent]:
        """Every block that keeps a state, in order."""
        blocks = (block for layer in self.layers.values() for block in layer.blocks)
        return [block for block in blocks if isinstance(block, Recurrent)]

    @property
    def groups(self) -> list[LinearGroup | ExpertGroup]:
        """All linears of the layers, in groups that read one input."""
        return [group for layer in self.layers.values() for group in layer.groups]

    def forward(self, hidden: torch.Tensor | None, inputs: Inputs, chunk: int = 0) -> torch.Tensor:
        """Run the layers on hidden [T, hidden_size] from the stage before; None on the first, which looks input_ids up.

        Of an encoder-decoder T are the encoder's tokens and behind them the decoder's, where inputs has a source.
        Returns what the next stage reads, [T, hidden_size]; on the last stage the sum of the token losses (a scalar)
        where inputs has labels, else what the head reads of the final hidden states. Of several chunks it runs one.
        """
        last = self._parts.head is not None and chunk == len(self._chunks) - 1
        if self._graphs is not None and torch.is_grad_enabled():
            hidden = self._graphs(inputs)
        else:
            hidden = self._layers(hidden, inputs, chunk)
        if last and inputs.labels is not None:
            return (self.sums if inputs.measures else self.loss)(hidden, self.head, inputs)
        return hidden

    def _layers(self, hidden: torch.Tensor | None, inputs: Inputs, chunk: int) -> torch.Tensor:
        """Return all of a chunk but the head and the loss."""
        layers, recomputer, memory = self._chunks[chunk], Recomputer(self._host), None
        if self._parts.encoder is not None:
            if inputs.source is not None:
                memory, hidden = self._parts.encoder(hidden, inputs, layers, recomputer)
                inputs = replace(inputs, memory=memory)
            layers = tuple(i for i in layers if i not in self._parts.encoder.layers)
        if self.embedding is not None and chunk == 0:
            hidden = self.embedding(inputs)
        delta = None  # what the last layer adds to hidden: added in the norm that reads the sum
        for layer in (self.layers[i] for i in layers):
            hidden, delta = layer(hidden, delta, inputs, recomputer)
        ends = self._parts.head is not None and chunk == len(self._chunks) - 1
        if ends and self._parts.norm is not None:
            hidden = self._parts.norm.after(hidden, delta)[1]
        elif delta is not None:
            hidden = hidden + delta
        if not ends:
            return hidden if memory is None else torch.cat([memory, hidden])
        draw = inputs.tokens.draw(self.config.stack.dropout, named_site("final norm"))
        return self._parts.head.reads(drop(hidden, inputs.tokens.local, draw))

    def read_pictures(self, read: ReadPicture | None, kept_bytes: int = KEPT_BYTES) -> None:
        """Say how the pixels of images are read, and how many bytes of their vectors are kept in host memory.

        Call before the first image; without a prefix here it does nothing.
        """
        if self.embedding is not None and self.embedding.prefix is not None:
            self.embedding.prefix.read, self.embedding.prefix.kept_bytes = read, kept_bytes

    def shard_dims(self) -> dict[str, Split]:
        """Return how tp cuts what is registered here itself: the head's bias in a row (spec.Head.bias_row)."""
        head, row = self.head, getattr(self.config.head, "bias_row", None)
        return {} if row is None or not isinstance(head, VocabParallelHead) else {row: head.row_split}

    def use_graphs(self) -> None:
        """Run the layers as CUDA graphs from here on (see megalora.models.graphs). The stage must be a whole model."""
        assert self.embedding is not None and self.head is not None and len(self._chunks) == 1
        self._graphs = LayerGraphs(lambda inputs: self._layers(None, inputs, 0), self._refresh_groups, self.place)

    def close(self) -> None:
        """Release what holds connections (see LayerGraphs.close). Call before destroying the process group."""
        if self._graphs is not None:
            self._graphs.close()
        self._graphs = None
        if self._host is not None:
            self._host.close()

    @property
    def offloads(self) -> bool:
        """Whether it keeps activations in host memory."""
        return self._host is not None

    @property
    def uses_graphs(self) -> bool:
        return self._graphs is not None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the adapters (and trained biases) of this stage, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def take_expert_loads(self) -> list[torch.Tensor]:
        """Return how often experts were chosen in training since the last call: [E] int64 for each layer of experts."""
        blocks = (block for layer in self.layers.values() for block in layer.blocks)
        routers = [block.router for block in blocks if isinstance(block, ExpertsBlock)]
        loads = [router.load.clone() for router in routers]
        for router in routers:
            router.load.zero_()  # in place: recorded CUDA graphs count there
        return loads

    def refresh_adapters(self, in_place: bool = False) -> None:
        """Bring the adapters to where they are read (see LinearGroup.refresh). Call after every change of them."""
        if in_place:  # of generation: its graphs are not the stage's
            assert self._graphs is None and self.shares_adapters
            for group in self.groups:
                if any(group.ranks):
                    group.refresh(in_place=True)
            return
        if self._graphs is not None:
            self._graphs.refresh()
        else:
            self._refresh_groups()

    def _refresh_groups(self) -> None:
        for group in self.groups:
            group.refresh()
        if decomposed := self._decomposed:
            settle_norms(decomposed, self.place)

    def keep_base(self) -> None:
        """Keep the base for `switch_adapters`. Call with the base loaded and no adapter yet."""
        for group in self.groups:
            group.keep_base()
        for words in self._trained_words:
            words.keep_base()

    def share_adapters(self, owners: Mapping[str, Sequence[int]]) -> None:
        """Let several adapters share the branches (see LinearGroup.share): a batch may then mix their tokens."""
        for group in self.groups:
            group.share(owners)
        self.shares_adapters = True

    def switch_adapters(self, on: bool) -> None:
        """Become the stage of the adapted model, or of the base alone (generation), after `refresh_adapters`."""
        for group in self.groups:
            group.switch(on)
        for words in self._trained_words:
            words.switch(on)

    @property
    def _decomposed(self) -> list[tuple[Decomposition, FrozenMatrix, torch.Tensor, bool]]:
        groups = (group for group in self.groups if isinstance(group, LinearGroup))
        return [(g.dora, g.matrix, g.down, g.row_parallel) for g in groups if g.dora is not None]

    @property
    def _trained_words(self) -> list[TrainedEmbedding | TrainedHead]:
        found = (None if self.embedding is None else self.embedding.words, self.head)
        return [words for words in found if isinstance(words, (TrainedEmbedding, TrainedHead))]

    @property
    def trains_words(self) -> bool:
        """Whether something of the embedding or of the head is trained here."""
        return bool(self._trained_words)

    def settle(self) -> None:
        """Set what of initial adapters is made of the base: magnitudes (DoRA), rows of tokens. Collective over tp."""
        if not self._settles:
            return
        self._settles = False
        for words in self._trained_words:
            if words.token_adapter is not None:
                words.token_adapter.reset(words)
        self._refresh_groups()
        for found, *_ in self._decomposed:
            found.reset()

    def reset_head(self, seed: int) -> None:
        """Fill what is trained of a classifier's head with its initial values, the same on every layout."""
        if isinstance(self.head, ClassScores):
            self.head.reset(seed)

    def reset_adapters(self, seed: int) -> None:
        """Set initial adapters, the same on every layout; call `settle` after it, once the base is loaded."""
        self._settles = bool(self._decomposed or self._trained_words)
        for words in self._trained_words:
            words.reset(seed, self.lora.config.init_lora_weights)
        for module in self.modules():
            if isinstance(module, ParallelLinear | SharedFactors):
                module.reset_adapter(seed, self.lora.config.init_lora_weights)


def _tie(embedding: VocabParallelEmbedding, head: VocabParallelHead) -> None:
    """Let both have one matrix, unless one of them trains its own; and the head the rows that the embedding trains."""
    if not embedding.weight.requires_grad and not head.weight.requires_grad:
        head.weight = embedding.weight
    if isinstance(embedding, TrainedEmbedding) and isinstance(head, TrainedHead) and head.token_adapter is None:
        head.tied_rows = lambda: embedding.token_adapter


@dataclass(frozen=True)
class _Parts:
    embedding: EmbeddingBlock | None
    encoder: EncoderBlock | None
    layers: dict[int, Layer]
    norm: Norm | None
    head: HeadBlock | ClassScores | None
