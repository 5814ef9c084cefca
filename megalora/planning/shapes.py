"""The sizes of one tensor-parallel rank's layers, as plain numbers: what memory and time are counted from.

The rank is the widest one: where heads, channels or the vocabulary are cut unevenly, others hold less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalora.lora import ResolvedLora, layer_index
from megalora.models.config import ModelConfig, cut_heads
from megalora.models.mlp import INNER_STEP
from megalora.ops.lora_linear import room_for
from megalora.parallel.mesh import Axis
from megalora.parallel.split import even_part


@dataclass(frozen=True)
class Group:
    """A megalora.parallel.linear.LinearGroup in numbers.

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
class Layer:
    """One decoder layer: its groups in order of computation, and the heads of its attention."""

    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    window: int | None
    qk_norm: bool

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def frozen(self) -> int:
        """Elements of all that is frozen: linears and norms."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
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

    vocabulary  rows of the embedding, and of the head, on this rank
    lowest      the first layer that has something to train; the number of layers where none has
    device_type "cuda" or "cpu": the room of a group, and what a few ops keep, depend on it
    """

    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    tied: bool
    tp: int
    device_type: str

    @property
    def lowest(self) -> int:
        return next((i for i, layer in enumerate(self.layers) if layer.trains), len(self.layers))

    @property
    def embedding(self) -> int:
        """Elements of the embedding, and of the head."""
        return self.vocabulary * self.hidden


def shape_of(config: ModelConfig, lora: ResolvedLora, tp: int, device_type: str = "cuda") -> Shape:
    """The Shape of `config` with the adapters of `lora`, cut over `tp` ranks, as it lies on a device of that type."""
    ranks = [Axis(rank, tuple(range(tp))) for rank in range(tp)]
    cuts = [cut_heads(config, axis) for axis in ranks]
    heads = max(cut.query.stop - cut.query.start for cut in cuts)
    kv_heads = max(cut.kv.stop - cut.kv.start for cut in cuts)
    parts = [even_part(config.intermediate_size, axis, INNER_STEP) for axis in ranks]
    inner = max(part.stop - part.start for part in parts)
    by_layer: dict[int | None, dict[str, int]] = {}
    for name, adapter in lora.adapters.items():
        by_layer.setdefault(layer_index(name), {})[name] = adapter.r

    def layer(index: int) -> Layer:
        prefix, dim, size = f"model.layers.{index}", config.head_dim, config.hidden_size

        def group(inputs: int, linears: Mapping[str, int], row_parallel: bool, has_bias: bool, block: str) -> Group:
            names = [f"{prefix}.{block}.{short}" for short in linears]
            adapters = tuple(by_layer.get(index, {}).get(name, 0) for name in names)
            biases = [(n, out) for n, out in zip(names, linears.values(), strict=True) if has_bias]
            return Group(
                inputs,
                tuple(linears.values()),
                adapters,
                room_for(sum(adapters), device_type),
                row_parallel,
                sum(out for _, out in biases),
                sum(out for name, out in biases if lora.trains_bias(name)),
            )

        kv = kv_heads * dim
        return Layer(
            group(
                size,
                {"q_proj": heads * dim, "k_proj": kv, "v_proj": kv},
                False,
                config.qkv_bias,
                "self_attn",
            ),
            group(heads * dim, {"o_proj": size}, True, config.output_bias, "self_attn"),
            group(size, {"gate_proj": inner, "up_proj": inner}, False, config.mlp_bias, "mlp"),
            group(inner, {"down_proj": size}, True, config.mlp_bias, "mlp"),
            heads,
            kv_heads,
            dim,
            size,
            config.sliding_windows[index],
            config.qk_norm,
        )

    return Shape(
        tuple(layer(i) for i in range(config.num_hidden_layers)),
        config.hidden_size,
        -(-config.vocab_size // tp),
        config.tie_word_embeddings,
        tp,
        device_type,
    )
