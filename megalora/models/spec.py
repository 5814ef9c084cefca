"""A model as data: what every part of megalora knows of a model's shape and names. No torch here.

A family (megalora.models.families) composes these from a config; modules, loading, adapters, planning, FLOP counts and
generation read them. Sizes are those of the whole model, names those of the Hugging Face file: a layer's are relative
to its place in the stack, `{prefix}.{index}.`.

Linears are in megalora.models.linears, embeddings in megalora.models.embeddings; norms, positions and mixers in
megalora.models.mixers. To add a kind of these, add its dataclass there, its block in megalora/models/blocks and its
counts in megalora/planning/nodes.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from megalora.models.embeddings import Boxes, Embedding, Positions  # noqa: F401
from megalora.models.heads import BUFFERS, ClassHead, FileNames, Head, TaskHead  # noqa: F401
from megalora.models.linears import (  # noqa: F401 (a spec is composed of them: families import all from here)
    Blocked,
    ByGroup,
    ByHead,
    Fused,
    Interleaved,
    Linear,
    Piece,
    Projection,
    Rows,
    linears_of,
)
from megalora.models.mixers import (  # noqa: F401
    MLP,
    Alibi,
    Attention,
    Clamp,
    CrossAttention,
    Disentangled,
    Experts,
    LatentAttention,
    Norm,
    Position,
    RelativeTable,
    Rotary,
    Temperature,
)
from megalora.models.prefix import ImagePrefix
from megalora.models.recurrent import DeltaAttention, GatedConvolution, RecurrentMixer, StateSpace  # noqa: F401

_EXPERT = re.compile(r"\.\d+\.(?=[^.]+$)")  # what sets the linears of an expert apart
_LAYER = re.compile(r".*?\.\d+\.")  # what the name of a layer's tensor begins with
Mixer = Attention | CrossAttention | LatentAttention | MLP | Experts | RecurrentMixer
_OWN = Attention | RecurrentMixer | Experts | MLP  # which may have tensors that are neither linears nor norms


@dataclass(frozen=True)
class Residual:
    """x -> total * post_norm(x + scale * output_norm(mixer(norm(x)))); a norm that is None does nothing.

    dropout  of the base, of what is added, in training
    total    name of a tensor [1], frozen; None: 1
    """

    mixer: Mixer
    norm: Norm | None
    output_norm: Norm | None = None
    scale: float = 1.0
    post_norm: Norm | None = None
    dropout: float = 0.0
    total: str | None = None

    @property
    def branches(self) -> tuple[Residual, ...]:
        return (self,)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All that it has, the mixer's own at the end."""
        own = (self.norm, self.output_norm, self.post_norm)
        return (*(norm for norm in own if norm is not None), *self.mixer.norms)


@dataclass(frozen=True)
class ParallelResidual:
    """x -> total * (x + output_norm(the sum over branches of scale * mixer(norm(x)))), all of the same x: branches may
    share their norm. Where branches have norms of their results, these come before the sum.

    dropout  of the base, of the sum, in training
    total    name of a tensor [1], frozen; None: 1
    """

    branches: tuple[Residual, ...]
    dropout: float = 0.0
    output_norm: Norm | None = None
    total: str | None = None

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All that it has, its own at the end."""
        own = () if self.output_norm is None else (self.output_norm,)
        return (*(norm for branch in self.branches for norm in branch.norms), *own)


Layer = tuple[Residual | ParallelResidual, ...]


def mixers_of(layer: Layer) -> tuple[Mixer, ...]:
    """Return the mixers of a layer in order of computation."""
    return tuple(branch.mixer for step in layer for branch in step.branches)


@dataclass(frozen=True)
class Stack:
    """The layers, `{prefix}.{index}.` each, and the norm behind the last (None: the last layer's result is normed).

    dropout  of the base, behind the norm
    encoder  of an encoder-decoder: the first `encoder.count` layers are the encoder's, and `prefix` and `final_norm`
             are of the others, which count from 0 again
    """

    prefix: str
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    dropout: float = 0.0
    encoder: Encoder | None = None

    def of_layer(self, index: int, name: str) -> str:
        """Return the full name of what a layer calls `name`."""
        count = 0 if self.encoder is None else self.encoder.count
        if self.encoder is not None and index < count:
            return f"{self.encoder.prefix}.{index}.{name}"
        return f"{self.prefix}.{index - count}.{name}"


@dataclass(frozen=True)
class Encoder:
    """The first layers of an encoder-decoder's stack: they read the source, and every decoder layer what they leave.

    count      of the layers, `{prefix}.{index}.` each
    embedding  of the source's tokens, with the words of the model's own embedding
    dropout    of the base, behind the norm
    start      the token that the decoder begins with; forced: the one that it is made to write first, or None
    """

    prefix: str
    count: int
    embedding: Embedding
    final_norm: Norm | None
    dropout: float
    start: int
    forced: int | None = None


class PlacedLinear(NamedTuple):
    """A linear of the model and the layer that holds it."""

    linear: Linear
    layer: int


@dataclass(frozen=True)
class ModelSpec:
    """A language model, or what a classifier is made of: a decoder, an encoder, or both (`encoder`).

    max_position_embeddings  tokens of the longest document it is made for
    model_type     as config.json names it
    dtype          of the weights in the file, as config.json names it, or None
    stored         the format of the linears in the file, one of choices.BASE_FORMATS
    stored_words   rows of the embedding in the file, where they are another number than its vocab_size
    predicting     layers behind the last that only predict further tokens, which files may hold: they are passed over
    task_heads     heads that it can have instead, for other tasks (see `for_task`)
    prefix         what makes vectors of an image, which stand before a text; None: it reads text alone
    """

    embedding: Embedding
    stack: Stack
    head: Head | ClassHead
    max_position_embeddings: int
    model_type: str = ""
    dtype: str | None = None
    stored: str = "dense"
    stored_words: int | None = None
    predicting: int = 0
    files: FileNames = field(default_factory=FileNames)
    task_heads: tuple[TaskHead, ...] = ()
    prefix: ImagePrefix | None = None

    @property
    def encoder(self) -> Encoder | None:
        """The encoder of an encoder-decoder."""
        return self.stack.encoder

    @property
    def causal(self) -> bool:
        """Whether a token sees itself and those before it alone."""
        return getattr(self.attention, "causal", True)  # latents attend to what is before them

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of each token beside its id and position."""
        types = self.embedding.types
        found = () if types is None or types.rows == 1 else ("token_types",)
        return found if self.embedding.boxes is None else (*found, "boxes")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its classes; none of a language model."""
        return self.head.labels if isinstance(self.head, ClassHead) else ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it can be trained for, by peft's names."""
        language = ("CAUSAL_LM" if self.encoder is None else "SEQ_2_SEQ_LM",) if isinstance(self.head, Head) else ()
        return (*language, *(task for task, _ in self.task_heads))

    def for_task(self, task: str, labels: Sequence[str] = ()) -> ModelSpec:
        """Return the model with the head of one of `tasks`; labels: names of its classes, where it has such."""
        found = dict(self.task_heads).get(task)
        if found is None:
            return self
        out = replace(found.out, out_features=len(labels))
        others = {f"{name}." for head in (self.head, *dict(self.task_heads).values()) for name in head.names}
        passed = (*self.files.passed, *sorted(others - {f"{name}." for name in found.names}))
        head = replace(found, out=out, labels=tuple(labels))
        return replace(self, head=head, files=replace(self.files, passed=passed))

    def with_words(self, vocab_size: int) -> ModelSpec:
        """Return the model with another number of words than its file has: rows are added at the end, or left out."""
        stored = self.vocab_size if self.stored_words is None else self.stored_words
        embedding = replace(self.embedding, vocab_size=vocab_size)
        return replace(self, embedding=embedding, stored_words=None if vocab_size == stored else stored)

    @property
    def hidden_size(self) -> int:
        return self.embedding.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.embedding.vocab_size

    @property
    def num_hidden_layers(self) -> int:
        return len(self.stack.layers)

    @property
    def tie_word_embeddings(self) -> bool:
        return self.head.tied

    @property
    def num_attention_heads(self) -> int:
        return self.attention.heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim

    @cached_property
    def attention(self) -> Attention | LatentAttention:
        """The first layer's attention: what head sizes and counts are told from where one number is asked for."""
        of_layers = (mixer for layer in self.stack.layers for mixer in mixers_of(layer))
        return next(mixer for mixer in of_layers if isinstance(mixer, Attention | LatentAttention))

    @cached_property
    def mixers(self) -> tuple[Mixer, ...]:
        """Every distinct mixer."""
        return tuple(dict.fromkeys(mixer for layer in dict.fromkeys(self.stack.layers) for mixer in mixers_of(layer)))

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """Every distinct norm."""
        positions = (mixer.position for mixer in self.mixers if isinstance(mixer, Attention))
        found = (norm for layer in dict.fromkeys(self.stack.layers) for step in layer for norm in step.norms)
        ends = [self.embedding.norm, self.stack.final_norm]
        ends += [position.norm for position in positions if isinstance(position, Disentangled)]
        if self.encoder is not None:
            ends += [self.encoder.embedding.norm, self.encoder.final_norm]
        return tuple(dict.fromkeys((*found, *(norm for norm in ends if norm is not None))))

    @cached_property
    def routers(self) -> frozenset[str]:
        """The full names of the linears that choose experts."""
        return frozenset(self.stack.of_layer(index, mixer.router.linear.name) for index, mixer in self._of_experts)

    @property
    def recurrent(self) -> bool:
        """Whether layers keep a state of what was read, which cannot be taken back to an earlier token."""
        return any(isinstance(mixer, RecurrentMixer) for mixer in self.mixers)

    @property
    def has_experts(self) -> bool:
        return any(isinstance(mixer, Experts) for mixer in self.mixers)

    @property
    def plain_scores(self) -> bool:
        """Whether the kernels of GPUs compute all attention: no scores are capped, none have a bias or sinks, and what
        a token sees does not begin at multiples of its position."""
        mixers = [mixer for mixer in self.mixers if isinstance(mixer, Attention)]
        biased = any(isinstance(mixer.position, Alibi | RelativeTable | Disentangled) for mixer in mixers)
        return not biased and all(
            mixer.softcap is None and mixer.sinks is None and mixer.chunk is None for mixer in mixers
        )

    @property
    def reads_positions(self) -> bool:
        """Whether a part of the model reads the position of a token itself, not a table made of it."""
        attentions = [mixer for mixer in self.mixers if isinstance(mixer, Attention | LatentAttention)]
        read = any(isinstance(one.position, Alibi) or one.temperature is not None for one in attentions)
        return read or self.embedding.positions is not None

    @property
    def chunks(self) -> frozenset[int]:
        """The sizes of the chunks in which attention goes, where it does."""
        of_mixers = (mixer.chunk for mixer in self.mixers if isinstance(mixer, Attention))
        return frozenset(chunk for chunk in of_mixers if chunk is not None)

    @cached_property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Every distinct rotation, in order of layers."""
        of_layers = (mixer for layer in self.stack.layers for mixer in mixers_of(layer))
        positions = (mixer.position for mixer in of_layers if isinstance(mixer, Attention | LatentAttention))
        return tuple(dict.fromkeys(position for position in positions if isinstance(position, Rotary)))

    @cached_property
    def linears(self) -> Mapping[str, PlacedLinear]:
        """Every linear that can carry an adapter, by full name: all but the head."""
        return {
            self.stack.of_layer(index, linear.name): PlacedLinear(linear, index)
            for index, layer in enumerate(self.stack.layers)
            for mixer in mixers_of(layer)
            for linear in mixer.linears
        }

    @property
    def layer_sizes(self) -> list[int]:
        """Elements of each layer's tensors."""
        places, sizes = {self.stack.of_layer(i, ""): i for i in range(self.num_hidden_layers)}, Counter[int]()
        for name, shape in self.tensors.items():
            found = _LAYER.match(name)
            if found is not None and found[0] in places:
                sizes[places[found[0]]] += math.prod(shape)
        return [sizes[i] for i in range(self.num_hidden_layers)]

    @property
    def _of_experts(self) -> list[tuple[int, Experts]]:
        """All mixtures of experts, each with the number of its layer."""
        return [(i, m) for i, layer in enumerate(self.stack.layers) for m in mixers_of(layer) if isinstance(m, Experts)]

    @cached_property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Every tensor of the file that holds those of several experts, by full name, and their full names in order."""
        return {
            self.stack.of_layer(index, name): tuple(self.stack.of_layer(index, part) for part in parts)
            for index, mixer in self._of_experts
            for name, parts in mixer.stacks()
        }

    @cached_property
    def joins(self) -> Mapping[str, tuple[str, ...]]:
        """Weights that some files have in parts along their rows: our full name -> those of the parts, in order."""
        return {
            self.stack.of_layer(index, f"{linear.name}.weight"): tuple(
                self.stack.of_layer(index, f"{linear.name.rpartition('.')[0]}.{part}.weight") for part in mixer.apart
            )
            for index, mixer in self._of_experts
            if mixer.apart
            for linear in (mixer.at(expert).linears[0] for expert in range(mixer.count))
        }

    @cached_property
    def stacked_linears(self) -> Mapping[str, tuple[str, ...]]:
        """The weights of several experts that are one parameter in transformers, by its name, and their linears."""
        weights = (parts for parts in self.stacks.values() if parts[0].endswith(".weight"))
        linears = (tuple(part.removesuffix(".weight") for part in parts) for parts in weights)
        return {_EXPERT.sub(".", names[0]): names for names in linears}

    @property
    def expert_counts(self) -> dict[str, int]:
        """How many experts have a linear, by its name without the number: in transformers one parameter of a layer."""
        return {
            _EXPERT.sub(".", self.stack.of_layer(index, linear.name)): mixer.count
            for index, mixer in self._of_experts
            for linear in mixer.at(0).linears
        }

    @cached_property
    def in_stacks(self) -> frozenset[str]:
        """The linears of `stacked_linears`."""
        return frozenset(name for names in self.stacked_linears.values() for name in names)

    @cached_property
    def fused_experts(self) -> Mapping[str, tuple[str, ...]]:
        """The linears of experts that transformers has in one: its name for those of one expert, and ours."""
        found: dict[str, tuple[str, ...]] = {}
        for index, mixer in self._of_experts:
            for expert in range(0 if mixer.stacked else mixer.count):
                *ups, down = (self.stack.of_layer(index, linear.name) for linear in mixer.at(expert).linears)
                stem = self.stack.of_layer(index, f"{mixer.within}.{expert}")
                first = "up_proj" if mixer.expert.gate is None else "gate_up_proj"
                found |= {f"{stem}.{first}": tuple(ups), f"{stem}.down_proj": (down,)}
        return found

    @cached_property
    def shares(self) -> Mapping[str, float]:
        """The share of all tokens that goes through a linear on average, by full name, where it is less than 1."""
        tables = {  # of positions, whose rows a microbatch reads once, however many tokens it has
            self.stack.of_layer(index, linear.name): 0.0
            for index, layer in enumerate(self.stack.layers)
            for mixer in mixers_of(layer)
            if isinstance(mixer, Attention) and isinstance(mixer.position, Disentangled)
            for linear in mixer.position.linears
        }
        return tables | {
            self.stack.of_layer(index, linear.name): mixer.router.top / mixer.count
            for index, mixer in self._of_experts
            for expert in range(mixer.count)
            for linear in mixer.at(expert).linears
        }

    @cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of the file, by full name, with its shape; without the head where it is tied."""
        found: dict[str, tuple[int, ...]] = dict(() if self.prefix is None else self.prefix.tensors())
        found |= dict(self.embedding.tensors())
        if self.encoder is not None:
            found |= dict(self.encoder.embedding.tensors())
            found |= {} if self.encoder.final_norm is None else dict(self.encoder.final_norm.tensors())
        for index, layer in enumerate(self.stack.layers):
            for mixer in mixers_of(layer):
                if isinstance(mixer, Attention) and isinstance(mixer.position, RelativeTable):
                    found[mixer.position.weight] = (mixer.position.buckets, mixer.heads)
                if isinstance(mixer, Attention) and isinstance(mixer.position, Disentangled):
                    found |= dict(mixer.position.tensors())
                for part in (*mixer.linears, *((mixer,) if isinstance(mixer, _OWN) else ())):
                    found |= {self.stack.of_layer(index, name): shape for name, shape in part.tensors()}
        found |= dict(self.head.tensors(self.vocab_size, self.embedding.width))
        for index, layer in enumerate(self.stack.layers):
            for step in layer:
                if step.total is not None:
                    found[self.stack.of_layer(index, step.total)] = (1,)
                for norm in step.norms:
                    found |= {self.stack.of_layer(index, name): shape for name, shape in norm.tensors()}
        return found if self.stack.final_norm is None else found | dict(self.stack.final_norm.tensors())
