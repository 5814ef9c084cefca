"""The sizes of one tensor-parallel rank's layers, as plain numbers: what memory and time are counted from.

The rank is the widest one: where heads, channels or the vocabulary are cut unevenly, others hold less.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megalora.adapters.config import ResolvedLora
from megalora.models import spec
from megalora.models.blocks.mlp import INNER_STEP
from megalora.models.spec import ModelSpec
from megalora.ops.lora_linear import room_for
from megalora.parallel.mesh import Axis
from megalora.parallel.split import cut_heads, even_part


@dataclass(frozen=True)
class Group:
    """A megalora.parallel.group.LinearGroup in numbers.

    inputs, outputs  features of the input, and of each linear, on this rank
    ranks            of each linear's adapter, 0 without one
    room             columns behind the input for the branches
    biases           features of biases (0: none); trained_biases, those of them that are trained
    """

    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    room: int
    row_parallel: bool
    biases: int
    trained_biases: int

    @property
    def output(self) -> int:
        return sum(self.outputs)

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def adapted(self) -> int:
        """How many of the linears carry an adapter."""
        return sum(rank > 0 for rank in self.ranks)

    @property
    def trains(self) -> bool:
        return self.rank > 0 or self.trained_biases > 0

    @property
    def frozen(self) -> int:
        """Elements of the frozen weights and biases."""
        return self.inputs * self.output + self.biases - self.trained_biases

    @property
    def trained(self) -> int:
        """Elements of the adapters and trained biases."""
        pairs = zip(self.ranks, self.outputs, strict=True)
        return sum(rank * (self.inputs + out) for rank, out in pairs) + self.trained_biases

    @property
    def copies(self) -> int:
        """Elements held beside the parameters in the compute dtype: A of all branches, the room of the matrix (whose
        columns hold s B), the biases."""
        return self.rank * self.inputs + self.room * self.output + self.biases


@dataclass(frozen=True)
class Attention:
    """A megalora.models.spec.Attention on one rank: its groups, and its heads there."""

    qkv: Group
    out: Group
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    qk_norm: bool

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.out

    @property
    def norms(self) -> int:
        """Elements of its norms."""
        return 2 * self.head_dim if self.qk_norm else 0


@dataclass(frozen=True)
class MLP:
    """A megalora.models.spec.MLP on one rank. gated: down reads act(gate) * up, else act(up)."""

    up: Group
    down: Group
    gated: bool
    act: str

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.up, self.down

    @property
    def norms(self) -> int:
        return 0


Mixer = Attention | MLP


@dataclass(frozen=True)
class Step:
    """A residual: one mixer, or several that run beside each other on the same stream, each behind its norm.

    norms  elements of each mixer's norm (weight and bias); kind, of which norm
    """

    mixers: tuple[Mixer, ...]
    norms: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Layer:
    """One layer: its residuals in order of computation."""

    steps: tuple[Step, ...]
    hidden: int

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        return tuple(mixer for step in self.steps for mixer in step.mixers)

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for mixer in self.mixers for group in mixer.groups)

    @property
    def frozen(self) -> int:
        """Elements of all that is frozen: linears and norms."""
        norms = sum(sum(step.norms) for step in self.steps) + sum(mixer.norms for mixer in self.mixers)
        return sum(group.frozen for group in self.groups) + norms

    @property
    def trained(self) -> int:
        return sum(group.trained for group in self.groups)

    @property
    def copies(self) -> int:
        return sum(group.copies for group in self.groups)

    @property
    def trains(self) -> bool:
        return any(group.trains for group in self.groups)


@dataclass(frozen=True)
class Shape:
    """The whole model on one tensor-parallel rank.

    rotary      features that each of its rotations turns
    final_norm  elements of the norm behind the last layer (0: there is none), and its kind
    vocabulary  rows of the embedding, and of the head, on this rank
    width       columns of the embedding, and of the head
    before      elements of what else is in front of the first layer: positions, norm, projection
    behind      elements of what else the last layer's result goes through: projection, bias of the head
    lowest      the first layer that has something to train; the number of layers where none has
    device_type "cuda" or "cpu": the room of a group, and what a few ops keep, depend on it
    """

    layers: tuple[Layer, ...]
    hidden: int
    rotary: tuple[int, ...]
    final_norm: tuple[int, str]
    vocabulary: int
    tied: bool
    tp: int
    device_type: str
    width: int
    before: int = 0
    behind: int = 0

    @property
    def lowest(self) -> int:
        return next((i for i, layer in enumerate(self.layers) if layer.trains), len(self.layers))

    @property
    def embedding(self) -> int:
        """Elements of the embedding, and of the head."""
        return self.vocabulary * self.width


def shape_of(config: ModelSpec, lora: ResolvedLora, tp: int, device_type: str = "cuda") -> Shape:
    """Return the Shape of `config` with the adapters of `lora`, cut over `tp` ranks, on a device of that type."""
    rank, final = _Rank(config, lora, tp, device_type), config.stack.final_norm
    vocabulary, width = -(-config.vocab_size // tp), config.embedding.width
    before = sum(math.prod(shape) for _, shape in config.embedding.tensors()) - config.vocab_size * width
    projection = 0 if config.head.project is None else sum(math.prod(s) for _, s in config.head.project.tensors())
    return Shape(
        tuple(rank.layer(index, layer) for index, layer in enumerate(config.stack.layers)),
        config.hidden_size,
        tuple(rotary.size for rotary in config.rotaries),
        (0, "none") if final is None else (_elements(final), final.kind),
        vocabulary,
        config.head.tied,
        tp,
        device_type,
        width,
        before,
        projection + vocabulary * config.head.bias,
    )


def _elements(norm: spec.Norm) -> int:
    return norm.size * (1 + norm.bias)


class _Rank:
    """Reads a spec as the widest tensor-parallel rank holds it."""

    def __init__(self, config: ModelSpec, lora: ResolvedLora, tp: int, device_type: str):
        self._config, self._lora, self._device_type = config, lora, device_type
        self._ranks = [Axis(rank, tuple(range(tp))) for rank in range(tp)]

    def layer(self, index: int, layer: spec.Layer) -> Layer:
        """Return the shape of one layer."""
        steps = []
        for step in layer:
            mixers = tuple(self._mixer(index, branch.mixer) for branch in step.branches)
            norms = [branch.norm for branch in step.branches]
            steps.append(Step(mixers, tuple(map(_elements, norms)), norms[0].kind))
        return Layer(tuple(steps), self._config.hidden_size)

    def _mixer(self, index: int, mixer: spec.Mixer) -> Mixer:
        if isinstance(mixer, spec.Attention):
            return self._attention(index, mixer)
        inner = self._inner(mixer.inner)
        ups = [("gate", mixer.gate, inner)] if mixer.gate is not None else []
        return MLP(
            self._columns(index, [*ups, ("up", mixer.up, inner)]),
            self._group(index, inner, [(mixer.down, mixer.down.out_features)], row_parallel=True),
            mixer.gate is not None,
            mixer.act,
        )

    def _attention(self, index: int, mixer: spec.Attention) -> Attention:
        heads, kv_heads = self._heads(mixer.heads, mixer.kv_heads)
        dim = mixer.head_dim
        outputs = [("q", mixer.q, heads * dim), ("k", mixer.k, kv_heads * dim), ("v", mixer.v, kv_heads * dim)]
        return Attention(
            self._columns(index, outputs),
            self._group(index, heads * dim, [(mixer.out, mixer.out.out_features)], row_parallel=True),
            heads,
            kv_heads,
            dim,
            mixer.window,
            mixer.q_norm is not None,
        )

    @functools.cache  # noqa: B019 (a _Rank lives as long as one shape_of)
    def _heads(self, heads: int, kv_heads: int) -> tuple[int, int]:
        cuts = [cut_heads(heads, kv_heads, axis) for axis in self._ranks]
        return max(cut.query.size for cut in cuts), max(cut.kv.size for cut in cuts)

    @functools.cache  # noqa: B019
    def _inner(self, inner: int) -> int:
        return max(even_part(inner, axis, INNER_STEP).size for axis in self._ranks)

    def _columns(self, index: int, outputs: Sequence[tuple[str, spec.Projection, int]]) -> Group:
        """Return the group of column-parallel linears with these outputs: (name, what makes it, local rows) each."""
        rows: dict[spec.Linear, int] = {}
        for _, made, local in outputs:
            linear = made.linear if isinstance(made, spec.Fused) else made
            rows[linear] = rows.get(linear, 0) + local
        inputs = next(iter(rows)).in_features
        return self._group(index, inputs, list(rows.items()), row_parallel=False)

    def _group(self, index: int, inputs: int, rows: Sequence[tuple[spec.Linear, int]], row_parallel: bool) -> Group:
        names = [self._config.stack.of_layer(index, linear.name) for linear, _ in rows]
        adapters = [self._lora.adapter(name) for name in names]
        ranks = tuple(0 if adapter is None else adapter.r for adapter in adapters)
        biases = [(name, local) for name, (linear, local) in zip(names, rows, strict=True) if linear.bias]
        return Group(
            inputs,
            tuple(local for _, local in rows),
            ranks,
            room_for(sum(ranks), self._device_type),
            row_parallel,
            sum(local for _, local in biases),
            sum(local for name, local in biases if self._lora.trains_bias(name)),
        )
