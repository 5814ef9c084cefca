"""The sizes of one tensor-parallel rank's layers, as plain numbers: what memory and time are counted from.

The rank is the widest one: where heads, channels or the vocabulary are cut unevenly, others hold less.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megalora.adapters.config import ResolvedLora
from megalora.adapters.lora import Adapter
from megalora.adapters.sharing import SHARED
from megalora.models import spec
from megalora.models.blocks.mlp import INNER_STEP
from megalora.models.spec import ModelSpec
from megalora.ops.alibi import EXTRA
from megalora.ops.lora_linear import room_for
from megalora.parallel.mesh import Axis
from megalora.parallel.split import cut_heads, even_part
from megalora.planning.groups import Group
from megalora.planning.mixers import (
    MLP,
    Attention,
    CrossAttention,
    DeltaAttention,
    Experts,
    GatedConvolution,
    LatentAttention,
    Mixer,
    Norm,
    StateSpace,
)
from megalora.planning.steps import Branch, Layer, Step


@dataclass(frozen=True)
class Shape:
    """The whole model on one tensor-parallel rank.

    rotary      features that each of its rotations turns
    final_norm  the norm behind the last layer
    vocabulary  rows of the embedding, and of the head, on this rank
    width       columns of the embedding, and of the head
    before      elements of what else is in front of the first layer: positions, norm, projection
    behind      elements of what else the last layer's result goes through: projection, bias of the head
    capped      logits have a softcap, whose slope is kept beside them (on a GPU kernels know it)
    words       what is trained of the embedding and of the head: (elements on this rank, whether all of it) each
    scaled      the rows of the embedding are multiplied by a number
    classes     of a classifier, which has a head of its own instead of one on the vocabulary; 0: it has none
    scoring     elements that are trained of a classifier's head
    lowest      the first layer that has something to train; the number of layers where none has
    encoders    layers of the encoder of an encoder-decoder: the first ones
    prefix      elements of what makes vectors of images, before the first layer: in the compute dtype, and in float32
    device_type "cuda" or "cpu": the room of a group, and what a few ops keep, depend on it
    """

    layers: tuple[Layer, ...]
    hidden: int
    rotary: tuple[int, ...]
    final_norm: Norm | None
    vocabulary: int
    tied: bool
    tp: int
    device_type: str
    width: int
    before: int = 0
    behind: int = 0
    capped: bool = False
    scaled: bool = False
    classes: int = 0
    scoring: int = 0
    words: tuple[tuple[int, bool], tuple[int, bool]] = ((0, False), (0, False))
    encoders: int = 0
    prefix: tuple[int, int] = (0, 0)

    @property
    def head(self) -> int:
        """Elements of the matrix of a head on the vocabulary."""
        return 0 if self.classes else self.embedding

    @property
    def lowest(self) -> int:
        if self.words[0][0]:
            return 0
        return next((i for i, layer in enumerate(self.layers) if layer.trains), len(self.layers))

    @property
    def embedding(self) -> int:
        """Elements of the embedding."""
        return self.vocabulary * self.width

    @property
    def shared(self) -> bool:
        """Whether a tied head reads the embedding's own matrix, where one stage has both: neither trains a matrix of
        its own."""
        return self.tied and not any(whole for _, whole in self.words)

    def trained(self, chunks: Iterable[range], *, first: bool, last: bool) -> int:
        """Return the elements that a stage of these chunks trains, at the ends of the model too."""
        layers = sum(self.layers[i].trained for chunk in chunks for i in chunk)
        return layers + (self.words[0][0] if first else 0) + (self.words[1][0] + self.scoring if last else 0)


def shape_of(config: ModelSpec, lora: ResolvedLora, tp: int, device_type: str = "cuda") -> Shape:
    """Return the Shape of `config` with the adapters of `lora`, cut over `tp` ranks, on a device of that type."""
    rank, final = _Rank(config, lora, tp, device_type), config.stack.final_norm
    vocabulary, width = -(-config.vocab_size // tp), config.embedding.width
    ends = [config.embedding] + ([] if config.encoder is None else [config.encoder.embedding])
    before = sum(math.prod(shape) for end in ends for _, shape in end.tensors()) - len(ends) * config.vocab_size * width
    head = config.head
    trained = head.trained if isinstance(head, spec.ClassHead) else {}
    behind = sum(math.prod(s) for name, s in head.tensors(vocabulary, width) if name not in trained)
    if isinstance(head, spec.Head) and not head.tied:
        behind -= vocabulary * width
    return Shape(
        tuple(rank.layer(index, layer) for index, layer in enumerate(config.stack.layers)),
        config.hidden_size,
        tuple(rotary.size for rotary in config.rotaries),
        _norm(final),
        vocabulary,
        config.head.tied,
        tp,
        device_type,
        width,
        before,
        behind,
        isinstance(head, spec.Head) and head.softcap is not None,
        config.embedding.scale != 1.0,
        len(config.labels),
        sum(map(math.prod, trained.values())),
        (_words(config, lora, False, tp), _words(config, lora, True, tp)),
        0 if config.encoder is None else config.encoder.count,
        _prefix(config.prefix),
    )


def _prefix(prefix: spec.ImagePrefix | None) -> tuple[int, int]:
    sizes = [0, 0]
    for name, shape in () if prefix is None else prefix.tensors():
        sizes[prefix.is_wide(name)] += math.prod(shape)
    return sizes[0], sizes[1]


def _words(config: ModelSpec, lora: ResolvedLora, of_head: bool, tp: int) -> tuple[int, bool]:
    """Return what is trained of the embedding or the head on the widest rank, as Shape.words."""
    if of_head and not isinstance(config.head, spec.Head):
        return 0, False
    name = config.head.name if isinstance(config.head, spec.Head) and of_head else config.embedding.name
    words, vocabulary = lora.words(name), -(-config.vocab_size // tp)
    shapes = words.shapes(name, of_head, vocabulary, config.embedding.width)
    return sum(math.prod(shape) for shape in shapes.values()), words.whole


def _norm(norm: spec.Norm | None) -> Norm | None:
    if norm is None:
        return None
    return Norm(norm.size * (norm.weighted + norm.bias), 2 if norm.kind == "layer" else 1)


class _Rank:
    """Reads a spec as the widest tensor-parallel rank holds it."""

    def __init__(self, config: ModelSpec, lora: ResolvedLora, tp: int, device_type: str):
        self._config, self._lora, self._device_type = config, lora, device_type
        self._ranks = [Axis(rank, tuple(range(tp))) for rank in range(tp)]

    def layer(self, index: int, layer: spec.Layer) -> Layer:
        """Return the shape of one layer."""
        return Layer(tuple(self._step(index, step) for step in layer), self._config.hidden_size)

    def _step(self, index: int, step: spec.Residual | spec.ParallelResidual) -> Step:
        before: set[spec.Norm | None] = set()
        branches = []
        for branch in step.branches:
            norm, output, mixer = _norm(branch.norm), _norm(branch.output_norm), self._mixer(index, branch.mixer)
            shares, post = branch.norm in before, _norm(branch.post_norm)
            totals = branch.total is not None
            scaled = branch.scale != 1.0 or totals
            branches.append(Branch(mixer, norm, output, shares, scaled, post, branch.dropout > 0, totals))
            before.add(branch.norm)
        if isinstance(step, spec.Residual):
            return Step(tuple(branches))
        return Step(tuple(branches), _norm(step.output_norm), step.total is not None)

    def _mixer(self, index: int, mixer: spec.Mixer) -> Mixer:
        if isinstance(mixer, spec.Attention):
            return self._attention(index, mixer)
        if isinstance(mixer, spec.CrossAttention):
            return self._cross(index, mixer)
        if isinstance(mixer, spec.LatentAttention):
            return self._latent(index, mixer)
        if isinstance(mixer, spec.DeltaAttention):
            return self._delta(index, mixer)
        if isinstance(mixer, spec.GatedConvolution):
            return self._convolution(index, mixer)
        if isinstance(mixer, spec.StateSpace):
            return self._state_space(index, mixer)
        return self._experts(index, mixer) if isinstance(mixer, spec.Experts) else self._mlp(index, mixer)

    def _experts(self, index: int, mixer: spec.Experts) -> Experts:
        """Return the experts' shape; of experts whose adapters differ in rank (rank_pattern) the largest counts."""
        size = self._config.hidden_size

        def group(linears: Sequence[spec.Linear], inputs: int) -> Group:
            return self._group(index, inputs, [(linear, linear.out_features) for linear in linears], row_parallel=False)

        mlps = [mixer.at(i).linears for i in range(mixer.count)]
        ups, downs = [group(mlp[:-1], size) for mlp in mlps], [group(mlp[-1:], mixer.expert.inner) for mlp in mlps]
        up, down = (max(groups, key=lambda one: one.rank) for groups in (ups, downs))
        held, factors = -(-mixer.count // len(self._ranks)), SHARED[self._lora.config.expert_lora]
        pairs = [(one.inputs, out, r) for one in (up, down) for out, r in zip(one.outputs, one.ranks, strict=True)]
        common = sum(r * (inputs * ("A" in factors) + out * ("B" in factors)) for inputs, out, r in pairs)
        return Experts(
            group([mixer.router.linear], size),
            up,
            down,
            held,
            mixer.count,
            mixer.router.top,
            mixer.router.wide,
            None if mixer.shared is None else self._mlp(index, mixer.shared),
            None if mixer.shared_gate is None else group([mixer.shared_gate], size),
            spared=(held - 1) * common,
            norms=sum(math.prod(shape) for _, shape in mixer.tensors()),
            grouped=mixer.router.groups > 1,
            drops=any(adapter.dropout > 0 for mlp in mlps for adapter in self._adapters(index, mlp)),
        )

    def _adapters(self, index: int, linears: Sequence[spec.Linear]) -> list[Adapter]:
        found = (self._lora.adapter(self._config.stack.of_layer(index, linear.name)) for linear in linears)
        return [adapter for adapter in found if adapter is not None]

    def _cross(self, index: int, mixer: spec.CrossAttention) -> CrossAttention:
        heads, _ = self._heads(mixer.heads, mixer.heads)
        inner = heads * mixer.head_dim

        def columns(*linears: spec.Linear) -> Group:
            return self._columns(index, [("", linear, inner) for linear in linears])

        out = self._group(index, inner, [(mixer.out, mixer.out.out_features)], row_parallel=True)
        return CrossAttention(columns(mixer.q), columns(mixer.k, mixer.v), out, heads, mixer.head_dim)

    def _delta(self, index: int, mixer: spec.DeltaAttention) -> DeltaAttention:
        groups = max(even_part(mixer.groups, axis).size for axis in self._ranks)
        rows = mixer.rows
        inputs = self._columns(index, [(name, made, groups * rows[name]) for name, made in mixer.projections.items()])
        out = self._group(index, groups * rows["v"], [(mixer.out, mixer.out.out_features)], row_parallel=True)
        norms = mixer.norm.size + sum(math.prod(shape) * groups // mixer.groups for _, shape in mixer.tensors())
        return DeltaAttention(inputs, out, groups, mixer.repeats, mixer.key, mixer.value, norms)

    def _convolution(self, index: int, mixer: spec.GatedConvolution) -> GatedConvolution:
        channels = self._inner(mixer.channels)
        return GatedConvolution(
            self._columns(index, [(name, mixer.made, channels) for name in "bcx"]),
            self._group(index, channels, [(mixer.out, mixer.out.out_features)], row_parallel=True),
            mixer.width,
            channels * (mixer.width + mixer.biased),
        )

    def _state_space(self, index: int, mixer: spec.StateSpace) -> StateSpace:
        heads, groups = self._heads(mixer.heads, mixer.groups)
        units = {"z": heads, "x": heads, "b": groups, "c": groups, "dt": heads}
        inputs = self._columns(index, [(name, mixer.made, units[name] * rows) for name, rows in mixer.rows.items()])
        inner = heads * mixer.features
        out = self._group(index, inner, [(mixer.out, mixer.out.out_features)], row_parallel=True)
        channels = inner + 2 * groups * mixer.state
        norms = channels * (mixer.width + mixer.convolution_biased) + 3 * heads + inner * (mixer.norm is not None)
        return StateSpace(
            inputs, out, heads, groups, mixer.features, mixer.state, mixer.norm is not None, norms
        )  # fmt: skip

    def _latent(self, index: int, mixer: spec.LatentAttention) -> LatentAttention:
        heads = max(even_part(mixer.heads, axis).size for axis in self._ranks)
        size, q, kv, out = self._config.hidden_size, mixer.q_up, mixer.kv_up, mixer.out
        downs = [linear for linear in (mixer.q_down, mixer.kv_down) if linear is not None]

        def group(linears: Sequence[tuple[spec.Linear, int]], inputs: int, row_parallel: bool = False) -> Group:
            return self._group(index, inputs, linears, row_parallel)

        return LatentAttention(
            group([(linear, linear.out_features) for linear in downs], size),
            group([(q, heads * mixer.head_dim)], q.in_features),
            group([(kv, heads * (mixer.plain + mixer.value))], kv.in_features),
            group([(out, out.out_features)], heads * mixer.value, True),
            mixer.q_down is None,
            heads,
            mixer.head_dim,
            mixer.turned,
            mixer.value,
            sum(norm.size for norm in mixer.norms),
            mixer.temperature is not None,
        )

    def _mlp(self, index: int, mixer: spec.MLP) -> MLP:
        inner = self._inner(mixer.inner)
        ups = [("gate", mixer.gate, inner)] if mixer.gate is not None else []
        return MLP(
            self._columns(index, [*ups, ("up", mixer.up, inner)]),
            self._group(index, inner, [(mixer.down, mixer.down.out_features)], row_parallel=True),
            mixer.gate is not None,
            mixer.act,
            mixer.fused_act is not None,
            sum(math.prod(shape) for _, shape in mixer.tensors()),
        )

    def _attention(self, index: int, mixer: spec.Attention) -> Attention:
        heads, kv_heads = self._heads(mixer.heads, mixer.kv_heads)
        dim = mixer.head_dim
        outputs = [("q", mixer.q, heads * dim), ("k", mixer.k, kv_heads * dim), ("v", mixer.v, kv_heads * dim)]
        outputs = outputs[:2] if mixer.one_for_both else outputs
        if mixer.gate is not None:
            outputs.insert(0, ("gate", mixer.gate, heads * dim))
        groups = (
            self._columns(index, outputs),
            self._group(index, heads * dim, [(mixer.out, mixer.out.out_features)], row_parallel=True),
        )
        norm, position, extra = mixer.q_norm, mixer.position, 0
        if isinstance(position, spec.Alibi) and (position.rounded or self._device_type == "cuda"):
            extra = EXTRA
        clips, rotates = mixer.clip is not None, isinstance(position, spec.Rotary)
        more: dict[str, Any] = {"extra": extra, "clips": clips, "reads_views": clips or not (rotates or extra)}
        more |= {"causal": mixer.causal}
        more |= {"chunk": mixer.chunk, "turns_first": mixer.turns_first, "tempered": mixer.temperature is not None}
        if isinstance(position, spec.Disentangled):
            own = [("", linear, heads * dim) for linear in position.linears]
            more["positions"] = groups[0] if position.shared else self._columns(index, own)
            more["terms"] = (position.key is not None) + (position.query is not None)
            more |= {"rows": 2 * position.span, "shares": position.shared}
        more["gated"] = mixer.gate is not None
        more |= {"v_normed": mixer.v_norm is not None, "v_shared": mixer.one_for_both}
        more["biases"] = sum(bias is not None for bias in (mixer.q_bias, mixer.v_bias))
        sinks = 0 if mixer.sinks is None else heads
        torchs = self._device_type == "cuda" and mixer.softcap is None and not sinks and not mixer.dropout
        # Our own kernels do so, in float32, where tiles of keys are few (fused_attention): 1 GB at most, not counted.
        more["expands"] = torchs and kv_heads < heads
        if norm is None:
            return Attention(*groups, heads, kv_heads, dim, mixer.window, sinks, **more)
        across = not norm.heads and norm.size != dim
        elements = (heads + kv_heads) * dim if norm.heads or across else 2 * dim * (norm.weighted + norm.bias)
        rows, statistics = 2 if across else heads + kv_heads, 2 if norm.kind == "layer" else 1
        kernel = norm.kind == "rms" and (not across or len(self._ranks) == 1)
        more |= {"qk_stacked": elements if norm.apart else 0}
        return Attention(
            *groups, heads, kv_heads, dim, mixer.window, elements + sinks, rows, statistics, kernel, across, **more
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
        found = [(a, local) for a, (_, local) in zip(adapters, rows, strict=True) if a is not None]
        return Group(
            inputs,
            tuple(local for _, local in rows),
            ranks,
            room_for(sum(ranks), self._device_type),
            row_parallel,
            sum(local for _, local in biases),
            sum(local for name, local in biases if self._lora.trains_bias(name)),
            sum(local for adapter, local in found if adapter.bias),
            sum(local for adapter, local in found if adapter.dora),
        )
