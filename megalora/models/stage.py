"""A causal language model, or the part of it that one pipeline stage holds: parts of other stages are None.

Parameter names are those of the HF file, with global layer indices on every stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalora.choices import RECOMPUTE
from megalora.lora import LoraConfig, ResolvedLora
from megalora.models.config import ModelConfig
from megalora.models.graphs import LayerGraphs
from megalora.models.inputs import Inputs
from megalora.models.layer import DecoderLayer
from megalora.models.norm import RMSNorm
from megalora.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from megalora.parallel.linear import ParallelLinear, Placement
from megalora.parallel.loss import cross_entropy_sum
from megalora.parallel.mesh import Axis
from megalora.parallel.split import named_splits

NO_LORA = ResolvedLora(LoraConfig(), {})


class Decoder(nn.Module):
    """The parts below the prefix `model.`."""

    def __init__(self, embed_tokens: nn.Module | None, layers: dict[str, nn.Module], norm: nn.Module | None):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleDict(layers)
        self.norm = norm


class Stage(nn.Module):
    """Layers `layers` of the model; with `first` the embedding, with `last` the final norm and the head.

    further    the layers of its further chunks, which follow later in the model (interleaved schedules): the embedding
               belongs to the first chunk, the norm and the head to the last
    recompute  "none"; "selective": rotation and attention run again in backward; "full": whole layers do
    Parameters are uninitialised: `checkpoint` fills the base, `reset_adapters` the adapters.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[int],
        place: Placement,
        lora: ResolvedLora = NO_LORA,
        *,
        first: bool = True,
        last: bool = True,
        further: Sequence[Iterable[int]] = (),
        recompute: str = "none",
    ):
        super().__init__()
        assert recompute in RECOMPUTE, recompute
        self._chunks = tuple(tuple(map(str, chunk)) for chunk in (layers, *further))
        self.config, self.place, self.lora = config, place, lora
        self.recompute_layers = recompute == "full"
        self._graphs: LayerGraphs | None = None
        embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, place) if first else None
        blocks = {i: DecoderLayer(config, int(i), place, lora, recompute == "selective") for i in chain(*self._chunks)}
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps, place) if last else None
        self.model = Decoder(embed, blocks, norm)
        self.lm_head = VocabParallelHead(config.vocab_size, config.hidden_size, place) if last else None
        if config.tie_word_embeddings and first and last:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, hidden: torch.Tensor | None, inputs: Inputs, chunk: int = 0) -> torch.Tensor:
        """hidden [T, hidden_size] from the stage before; None on the first, which looks input_ids up.

        Returns what the next stage reads, [T, hidden_size]; on the last stage the sum of the token losses (a scalar)
        where inputs has labels, else the final hidden states, normed. Of several chunks it runs one.
        """
        last = self.model.norm is not None and chunk == len(self._chunks) - 1
        if self._graphs is not None and torch.is_grad_enabled():
            hidden = self._graphs(inputs)
        else:
            hidden = self._layers(hidden, inputs, chunk)
        if last and inputs.labels is not None:
            return cross_entropy_sum(hidden, self.lm_head, inputs.labels, inputs.labelled)
        return hidden

    def _layers(self, hidden: torch.Tensor | None, inputs: Inputs, chunk: int) -> torch.Tensor:
        """All of a chunk but the head and the loss."""
        if self.model.embed_tokens is not None and chunk == 0:
            hidden = self.model.embed_tokens(inputs.input_ids)
        delta = None  # what the last layer adds to hidden: added in the norm that reads the sum
        for layer in (self.model.layers[i] for i in self._chunks[chunk]):
            if self.recompute_layers and torch.is_grad_enabled():
                hidden, delta = checkpoint(
                    layer, hidden, delta, inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, delta = layer(hidden, delta, inputs)
        if self.model.norm is None or chunk < len(self._chunks) - 1:
            return hidden if delta is None else hidden + delta
        return self.model.norm.after(hidden, delta)[1]

    def use_graphs(self) -> None:
        """Runs the layers as CUDA graphs from here on (see megalora.models.graphs): for a stage that is a whole model."""
        assert self.model.embed_tokens is not None and self.model.norm is not None and len(self._chunks) == 1
        self._graphs = LayerGraphs(
            lambda inputs: self._layers(None, inputs, 0), self._refresh_groups, self.place
        )

    def close(self) -> None:
        """To be called before torch.distributed ends: lets go of what holds its connections (see LayerGraphs.close)."""
        if self._graphs is not None:
            self._graphs.close()
        self._graphs = None

    @property
    def uses_graphs(self) -> bool:
        return self._graphs is not None

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapters (and trained biases) of this stage, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def refresh_adapters(self) -> None:
        """To be called after every change of the adapters, before the stage is used (see LinearGroup.refresh)."""
        if self._graphs is not None:
            self._graphs.refresh()
        else:
            self._refresh_groups()

    def _refresh_groups(self) -> None:
        for layer in self.model.layers.values():
            for group in layer.groups():
                group.refresh()

    def keep_base(self) -> None:
        """To be called with the base loaded and no adapter yet, where `switch_adapters` is to be used."""
        for layer in self.model.layers.values():
            for group in layer.groups():
                group.keep_base()

    def switch_adapters(self, on: bool) -> None:
        """The stage of the adapted model, or of the base alone (generation), after `refresh_adapters`."""
        for layer in self.model.layers.values():
            for group in layer.groups():
                group.switch(on)

    def reset_adapters(self, seed: int) -> None:
        """Initial adapters, the same on every layout."""
        for module in self.modules():
            if isinstance(module, ParallelLinear):
                module.reset_adapter(seed, self.lora.config.init_lora_weights)


def whole_on_meta(config: ModelConfig) -> Stage:
    """The whole base model without storage: its names and shapes are those of the HF file."""
    place = Placement(Axis(), False, torch.float32, "meta")
    return Stage(config, range(config.num_hidden_layers), place)


def expected_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF file of this model, with its shape; without lm_head.weight where it is tied."""
    shapes = {name: split.global_shape for name, split in named_splits(whole_on_meta(config)).items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def adaptable_linears(config: ModelConfig) -> list[str]:
    """Full names of the linears that can carry an adapter: all but the head."""
    return [module.name for module in whole_on_meta(config).modules() if isinstance(module, ParallelLinear)]
