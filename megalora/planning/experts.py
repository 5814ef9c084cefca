"""What the router and the experts of one layer compute and keep: see megalora.models.blocks.experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megalora.ops.grouped_gpu import branch_tiles
from megalora.parallel.experts import kept_columns, padded_rank
from megalora.planning.groups import Group
from megalora.planning.mixers import Experts
from megalora.planning.mlp import fuses, mlp_nodes
from megalora.planning.node import NOTHING, Node, Pass, Workload
from megalora.planning.quantised import linear_bytes

_WIDE, _INDEX = 4, 8  # bytes of a float32 score, of an int64
# Grouped products on GPUs: their rate, of that of a dense one with as many FLOPs (0.69 to 0.74 with 256 rows an expert
# on an H200, up to 0.96 where the card is at its power cap; benchmarks/experts.py), and the FLOPs in which a byte of a
# weight is read: of few rows an expert, reading the weights is all that takes time. On a CPU an expert's product is a
# dense one.
_GROUPED, _FLOPS_A_BYTE = {"cuda": 0.75}, {"cuda": 200}


def experts_nodes(layer: Any, mixer: Experts, flowing: bool) -> list[Node]:
    """Return the nodes of a mixture of experts: all between one gather and one sum over tp runs over all tokens.

    layer  the megalora.planning.nodes._LayerNodes of its layer
    """
    tokens, shape = layer.tokens, layer.shape
    inner = replace(
        layer,
        shape=replace(shape, tp=1),
        tokens=replace(tokens, local=tokens.full, stream=tokens.whole, gathers=False),
    )
    messages = layer._messages(mixer.router, True, 0.0, True)
    gathers = tuple(replace(message, kind="gather") for message in messages) if tokens.gathers else ()
    sums = Pass(live=tokens.whole, messages=messages, calls=len(messages))
    fetch = Pass(live=tokens.whole if gathers else 0, messages=gathers, calls=len(gathers))
    nodes = [Node("gathered tokens", 0, fetch, sums if flowing else NOTHING)]
    nodes += routed_nodes(mixer, layer.work, tokens.full, shape.device_type, flowing)
    if mixer.shared is not None and not mixer.shared.fused:
        nodes += mlp_nodes(inner, mixer.shared, "kept", flowing, unread=False)
    elif mixer.shared is not None:
        after = flowing or mixer.shared.up.trains
        fused = fuses(mixer.shared, shape.device_type)
        nodes += [
            inner._linears(mixer.shared.up, "kept", flowing, fused=fused),
            inner._linears(mixer.shared.down, "gated", after, fused=fused),
        ]
    if mixer.gate is not None:
        kept = tokens.whole + 2 * tokens.full * layer.work.element
        product = Pass(live=tokens.whole, traffic=3 * tokens.whole, calls=3)
        nodes += [inner._linears(mixer.gate, "kept", flowing)]
        nodes += [inner._node("shared gate", kept, product, product, flowing or mixer.trains)]
    return [*nodes, Node("sum of experts", 0, sums, fetch if flowing or mixer.trains else NOTHING)]


def routed_nodes(mixer: Experts, work: Workload, tokens: int, device_type: str, flowing: bool) -> list[Node]:
    """Return the nodes of the router and of the rank's experts; flowing: their input requires a gradient.

    tokens  F, all of the microbatch; the rank's experts take their even share of the pairs. On a GPU
            every pair has a row, whatever the rank
    """
    rows = mixer.rows(tokens)
    held = tokens * mixer.top if device_type == "cuda" else rows
    return [_router(mixer, work, tokens, flowing), _Pair(mixer, work, tokens, rows, held, device_type).node(flowing)]


def _router(mixer: Experts, work: Workload, tokens: int, flowing: bool) -> Node:
    """Count a router: scores, weights and choices are kept, the input once more where it is read in float32 for an
    adapter.
    """
    group, wide = mixer.router, max(_WIDE, work.element)
    e = wide if mixer.wide else work.element
    scores, chosen = tokens * mixer.count * wide, tokens * mixer.top
    copied = tokens * group.inputs * e if mixer.wide and group.rank else 0
    kept = copied + (tokens * group.room * e if group.rank else 0) + scores + chosen * (_INDEX + 2 * wide)
    product = 2 * tokens * (group.inputs + group.room) * group.output
    read = tokens * group.inputs * e
    # Product, softmax, three kernels of a sort, weights, counts; the best groups before. Backward adds dx of two.
    forward = Pass(live=3 * scores, traffic=read + 8 * scores, calls=14 + 12 * mixer.grouped)
    backward = Pass(live=2 * scores + read, traffic=4 * read, calls=17)
    if mixer.wide:
        forward, backward = replace(forward, flops32=product), replace(backward, flops32=product)
    else:
        forward, backward = replace(forward, flops=product), replace(backward, flops=product)
    return Node("router", kept, forward, backward) if flowing or group.trains else Node("router", 0, forward)


@dataclass(frozen=True)
class _Pair:
    """The experts of a rank as one function: megalora.parallel.experts_grad._Experts.

    rows  of the rank's experts, which kernels read and write; held: all that tensors have
    """

    mixer: Experts
    work: Workload
    tokens: int
    rows: int
    held: int
    device_type: str

    @property
    def e(self) -> int:
        return self.work.element

    @property
    def rate(self) -> float:
        return _GROUPED.get(self.device_type, 1.0)

    def bytes_of(self, features: int) -> int:
        """Return the bytes of so many features of the rank's rows."""
        return self.rows * features * self.e

    def node(self, flowing: bool) -> Node:
        """Count it: x, gate_up, both z and where each row comes from are kept; the rest is made again."""
        up, down, e, held = self.mixer.up, self.mixer.down, self.e, self.held
        kept = self.tokens * up.inputs * e + held * (up.output + self._kept(up) + self._kept(down)) * e
        kept += 2 * _INDEX * held
        kept += 0 if held == self.rows else self.tokens * self.mixer.top * (_INDEX + 1)
        if flowing or up.trains or down.trains:
            return Node("experts", kept, self.forward(), self.backward())
        return Node("experts", 0, self.forward())

    def forward(self) -> Pass:
        up, down, e, held = self.mixer.up, self.mixer.down, self.e, self.held
        x, inner, out = held * up.inputs * e, held * down.inputs * e, self.tokens * up.inputs * e
        one, gated = self.bytes_of(up.inputs), self.bytes_of(down.inputs)
        drops = x * self._drops(up), inner * self._drops(down)  # a copy of what A reads
        # Rows are made, and read for z; gate and up read, what is gated made and read for z; rows summed, z apart.
        again, again_gated = (bool(group.rank) and not self._at_tokens(group) for group in (up, down))
        traffic = (one + again * one) + (3 * gated + again_gated * gated) + one + 2 * out
        traffic += held * (up.room + down.room + self._kept(up) + self._kept(down)) * e + 2 * sum(drops)
        z = x + held * up.room * e
        return Pass(
            live=max(z + drops[0], z + held * up.output * e, inner + drops[1], inner + x) + out,
            flops=self._products + self._branch(up) + self._branch(down),
            traffic=traffic + self._decoded,
            calls=11 + again + again_gated + self._dropped_calls(1),
        )

    def backward(self) -> Pass:
        """Count it. The gradients of factors are added to where they lie."""
        up, down, e, held = self.mixer.up, self.mixer.down, self.e, self.held
        x, inner, out = held * up.inputs * e, held * down.inputs * e, self.tokens * up.inputs * e
        one, gated = self.bytes_of(up.inputs), self.bytes_of(down.inputs)
        parts = self._parts(up), self._parts(down)
        # Rows of dout made, those of dx summed; gradients of what is gated, which is made again; dy read for dz and dB,
        # that and x (whose rows are made for it) for dA, where they are not read at the tokens.
        made = bool(up.rank) and not self._at_tokens(up)
        traffic = (one + one + 3 * out) + (5 + (1 if self._fused else 3) * bool(down.rank)) * gated
        traffic += bool(down.rank) * ((not self._fused) * one + gated) + bool(up.rank) * 2 * gated + made * 2 * one
        traffic += sum(part + part * self.rows // max(1, held) for part in parts)
        traffic += 2 * _WIDE * self.mixer.held * (up.trained + down.trained)
        if self.mixer.drops:  # a copy of what A read, and the branch's term of dx, which is added by itself
            traffic += self._drops(up) * (2 * x + one + 3 * x) + self._drops(down) * (2 * inner + gated + 3 * inner)
        grads = 2 * self.rows * (up.rank * (up.inputs + up.output / 2) + down.rank * (down.inputs + down.output))
        terms = x * self._drops(up), inner * self._drops(down)
        return Pass(
            live=out
            + max(
                x + max(parts[1], inner + terms[1]),
                (3 if self._fused else 4) * inner + terms[1],
                2 * inner + max(parts[0], x + terms[0]),
            ),
            flops=self._products + self._branch(up) + self._branch(down) + grads / self.rate,
            traffic=traffic + self._decoded,
            calls=16 + made - self._fused + self._dropped_calls(4),
        )

    @property
    def _products(self) -> float:
        """FLOPs of the products with the experts' matrices."""

        def product(group: Group) -> float:
            weight = (group.inputs + group.room) * group.output
            read = _FLOPS_A_BYTE.get(self.device_type, 0) * self.mixer.held * weight * self.e
            return max(2 * self.rows * weight / self.rate, read)

        return product(self.mixer.up) + product(self.mixer.down)

    def _branch(self, group: Group) -> float:
        return 2 * self.rows * group.rank * group.inputs / self.rate

    @property
    def _decoded(self) -> int:
        """Bytes that decoding all experts' weights before each product reads and writes."""
        name, e, groups = self.work.base_format, self.e, (self.mixer.up, self.mixer.down)
        if name == "dense" or self.device_type != "cuda":
            return 0
        each = (linear_bytes(g, name, e) + (g.inputs + 2 * g.room) * g.output * e for g in groups)
        return self.mixer.held * sum(each)

    @property
    def _fused(self) -> bool:
        """Whether kernels are megalora.ops.grouped_gpu's, which read dout and x at the tokens."""
        return self.device_type == "cuda" and self.e == 2

    def _at_tokens(self, group: Group) -> bool:
        """Return whether z is made along with the rows that a group's A reads, and its dA reads what lies there."""
        return self._fused and not self._drops(group)

    def _ranks(self, group: Group) -> int:
        return sum(padded_rank(rank, self.device_type) for rank in group.ranks)

    def _kept(self, group: Group) -> int:
        """Return the columns of z that are kept."""
        return kept_columns(self._ranks(group), group.room)

    def _drops(self, group: Group) -> bool:
        return self.mixer.drops and group.rank > 0

    def _dropped_calls(self, each: int) -> int:
        """Return the calls of dropout: what it is drawn from, and `each` of each group."""
        return (5 if self.mixer.drops else 0) + each * (self._drops(self.mixer.up) + self._drops(self.mixer.down))

    def _parts(self, group: Group) -> int:
        """Return the bytes of the parts of dz, one for each tile of columns of dy (as `branch_` of grouped_gpu)."""
        if not self._fused or not group.rank:
            return 0
        tiles, columns = branch_tiles(group.output, self._ranks(group))
        return tiles * self.held * columns * _WIDE
