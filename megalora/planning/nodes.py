"""What a stage computes and keeps for one microbatch, autograd node by autograd node.

It follows megalora/models and the ops below them: who changes what an op saves for its backward changes it here too
(tests/planning/test_nodes.py counts what autograd really holds and compares to the byte).

Legend: T tokens of the microbatch on this rank outside the linears, F all its tokens (T = F without sequence
parallelism), e bytes of an element in the compute dtype, C room of a group (see megalora.ops.lora_linear).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megalora.ops import extension
from megalora.ops.activations import KEEPS_RESULT
from megalora.ops.lora_backward import fuses_gated
from megalora.ops.swiglu import fuses_down
from megalora.parallel.loss import CHUNK_LOGITS
from megalora.planning.experts import routed_nodes
from megalora.planning.groups import Group, with_factors
from megalora.planning.latent import latent_nodes
from megalora.planning.mixers import MLP, Attention, Experts, LatentAttention, Mixer, Norm
from megalora.planning.node import NOTHING, Message, Node, Pass, Workload, kept_bytes, peak_bytes
from megalora.planning.quantised import on_base
from megalora.planning.shapes import Branch, Layer, Shape

__all__ = ["Message", "Node", "Pass", "Workload", "chunk_nodes", "kept_bytes", "peak_bytes"]

_STATISTIC = 4  # bytes of a float32: the norms' inverses, the logsumexp of attention


def chunk_nodes(shape: Shape, layers: range, work: Workload, *, first: bool, last: bool) -> list[Node]:
    """The nodes of layers `layers`, in order of their forward; with `first` the embedding, with `last` norm and head.

    A chunk is what one stage holds, or one of its parts under an interleaved schedule.
    """
    tokens, bare = _Tokens.of(shape, work), replace(shape, layers=())
    flowing = shape.lowest < layers.start  # whether what comes in requires a gradient
    nodes: list[Node] = []
    if first:
        summed = (Message("reduce", tokens.whole),) if shape.tp > 1 else ()
        passes = 2 if shape.scaled else 1
        nodes.append(Node("embedding", 0, Pass(traffic=2 * passes * tokens.stream, messages=summed, calls=passes)))
    for index in layers:
        layer = shape.layers[index]
        nodes += _layer_nodes(layer, bare, work, index == layers.start, flowing)
        if index == layers.start + 1 and work.recompute == "full" and len(shape.layers[index - 1].steps) == 1:
            # A layer of one step gives its input on as it came: the two layers keep one tensor.
            nodes[-1] = replace(nodes[-1], kept=max(0, nodes[-1].kept - tokens.stream)) if flowing else nodes[-1]
        flowing = flowing or layer.trains
    nodes += _tail(shape, work, tokens, flowing) if last else [_output(tokens, flowing)]
    # Rotation tables and token numbers of the microbatch: every layer reads the same ones.
    turned = sum(shape.rotary)
    nodes.append(Node("inputs", tokens.full * (turned * work.element + 8) if flowing else 0, NOTHING))
    return nodes


# ---- the parts of a stage ----


@dataclass(frozen=True)
class _Tokens:
    """local T, full F; stream: bytes of one [T, hidden]; gathers: whether the linears gather their tokens."""

    local: int
    full: int
    stream: int
    whole: int
    gathers: bool

    @classmethod
    def of(cls, shape: Shape, work: Workload) -> _Tokens:
        gathers = work.sequence_parallel and shape.tp > 1
        local = work.tokens // shape.tp if gathers else work.tokens
        size = shape.hidden * work.element
        return cls(local, work.tokens, local * size, work.tokens * size, gathers)


def _computed_again(name: str, inner: list[Node], kept: int, tokens: _Tokens, gradient: int | None = None) -> Node:
    """A part of which only the inputs are kept; `gradient` bytes come in while it is computed again."""
    forward = _sum(node.forward for node in inner)
    again = replace(forward, live=tokens.stream if gradient is None else gradient)
    # Where the part's first node keeps the part's own input, that is not held twice.
    head = inner[0]
    shared = min(head.kept, tokens.stream) if head.name == "norm of the input" else 0
    inner = [replace(head, kept=head.kept - shared), *inner[1:]]
    return Node(name, kept, forward, again, tuple(inner))


def _sum(passes) -> Pass:
    passes = list(passes)
    return Pass(
        max((p.live for p in passes), default=0),
        sum(p.flops for p in passes),
        sum(p.flops8 for p in passes),
        sum(p.attention for p in passes),
        sum(p.traffic for p in passes),
        tuple(message for p in passes for message in p.messages),
        sum(p.calls for p in passes),
    )


@lru_cache(maxsize=4096)
def _layer_nodes(layer: Layer, shape: Shape, work: Workload, entering: bool, flowing: bool) -> tuple[Node, ...]:
    """entering: the layer is the first of its chunk, so the residual stream comes in one piece. flowing: what comes in
    requires a gradient."""
    tokens = _Tokens.of(shape, work)
    nodes = _LayerNodes(layer, shape, work, tokens, entering).build(flowing)
    if work.recompute == "full" and (flowing or layer.trains):
        nodes = [_computed_again("layer", nodes, tokens.stream * (1 if entering else 2), tokens)]
    return tuple(nodes)


@dataclass(frozen=True)
class _LayerNodes:
    """shape: of the model, without its layers."""

    layer: Layer
    shape: Shape
    work: Workload
    tokens: _Tokens
    entering: bool

    def build(self, flowing: bool) -> list[Node]:
        nodes: list[Node] = []
        for number, step in enumerate(self.layer.steps):
            name = "norm of the input" if self.entering and number == 0 else "norm"
            for branch in step.branches:
                mixer = branch.mixer
                source = "normed" if branch.norm is not None and not branch.shares else "kept"
                if branch.norm is None:
                    nodes.append(self._sum(name))
                    source = "new"
                elif not branch.shares:
                    room = 0 if isinstance(mixer, Experts) else mixer.groups[0].room
                    nodes.append(self._norm(name, branch.norm, mixer.groups[0].inputs + room, flowing))
                nodes += self._mixer(mixer, source, flowing)
                nodes += self._behind(branch, flowing or any(group.trains for group in mixer.groups))
                name = "norm of the same"
            flowing = flowing or any(group.trains for mixer in step.mixers for group in mixer.groups)
        return nodes

    def _sum(self, name: str) -> Node:
        """The residual stream in one piece, for a mixer without a norm."""
        if name == "norm of the input":
            return Node("sum", 0, NOTHING)
        return Node("sum", 0, Pass(live=self.tokens.stream, traffic=3 * self.tokens.stream, calls=1))

    def _behind(self, branch: Branch, flowing: bool) -> list[Node]:
        """What is done to the result of a mixer: its norm keeps it."""
        stream, nodes = self.tokens.stream, []
        both = Pass(live=stream, traffic=2 * stream, calls=1)
        if branch.output_norm is not None:
            kept = stream + self.tokens.local * _STATISTIC * branch.output_norm.statistics
            nodes.append(self._node("output norm", kept, both, replace(both, live=2 * stream), flowing))
        if branch.scaled:
            nodes.append(self._node("scale", 0, both, both, flowing))
        return nodes

    def _mixer(self, mixer: Mixer, source: str, flowing: bool) -> list[Node]:
        if isinstance(mixer, Attention):
            return self._attention(mixer, source, flowing)
        if isinstance(mixer, LatentAttention):
            return latent_nodes(self, mixer, source, flowing)
        return self._experts(mixer, flowing) if isinstance(mixer, Experts) else self._mlp(mixer, source, flowing)

    def _experts(self, mixer: Experts, flowing: bool) -> list[Node]:
        """All that lies between one gather and one sum over tp runs over all tokens, without messages."""
        tokens, shape = self.tokens, self.shape
        inner = replace(
            self,
            shape=replace(shape, tp=1),
            tokens=replace(tokens, local=tokens.full, stream=tokens.whole, gathers=False),
        )
        messages = self._messages(mixer.router, True, 0.0, True)
        gathers = tuple(replace(message, kind="gather") for message in messages) if tokens.gathers else ()
        sums = Pass(live=tokens.whole, messages=messages, calls=len(messages))
        fetch = Pass(live=tokens.whole if gathers else 0, messages=gathers, calls=len(gathers))
        nodes = [Node("gathered tokens", 0, fetch, sums if flowing else NOTHING)]
        nodes += routed_nodes(mixer, self.work, tokens.full, shape.device_type, flowing)
        if mixer.shared is not None:
            after = flowing or mixer.shared.up.trains
            fused = inner._fused(mixer.shared)
            nodes += [
                inner._linears(mixer.shared.up, "kept", flowing, fused=fused),
                inner._linears(mixer.shared.down, "gated", after, fused=fused),
            ]
        if mixer.gate is not None:
            kept = tokens.whole + 2 * tokens.full * self.work.element
            product = Pass(live=tokens.whole, traffic=3 * tokens.whole, calls=3)
            nodes += [inner._linears(mixer.gate, "kept", flowing)]
            nodes += [inner._node("shared gate", kept, product, product, flowing or mixer.trains)]
        return [*nodes, Node("sum of experts", 0, sums, fetch if flowing or mixer.trains else NOTHING)]

    def _attention(self, mixer: Attention, source: str, flowing: bool) -> list[Node]:
        after = flowing or mixer.qkv.trains
        # The norms of q and k keep views of q k v, and what is computed again begins with it.
        read = mixer.qk_rows > 0 or self.work.recompute == "selective"
        context = "recomputed" if self.work.recompute == "selective" and after else "kept" if after else "new"
        return [
            self._linears(mixer.qkv, source, flowing, read=read),
            self._core(mixer, after),
            self._linears(mixer.out, context, after),
        ]

    def _mlp(self, mixer: MLP, source: str, flowing: bool) -> list[Node]:
        after = flowing or mixer.up.trains
        if mixer.swiglu:
            fused = self._fused(mixer)
            return [
                self._linears(mixer.up, source, flowing, fused=fused, read=True),
                self._linears(mixer.down, "gated", after, fused=fused),
            ]
        # Some keep their result, which down reads; the others keep what they read, and what is gated both gate and up.
        inner = self.tokens.full * mixer.down.inputs * self.work.element
        kept = 2 * inner if mixer.gates else inner * (mixer.act != "linear")
        forward = Pass(live=inner, traffic=kept + inner, calls=1 + mixer.gates)
        backward = Pass(live=inner + kept, traffic=2 * kept + inner, calls=1 + 3 * mixer.gates)
        act = self._node("activation", kept, forward, backward, after)
        read = "kept" if mixer.act in KEEPS_RESULT and not mixer.gates and after else "new"
        up = self._linears(mixer.up, source, flowing, read=kept > 0 and (mixer.gates or mixer.act not in KEEPS_RESULT))
        return [up, act, self._linears(mixer.down, read, after)]

    def _node(self, name: str, kept: int, forward: Pass, backward: Pass, flowing: bool) -> Node:
        return Node(name, kept, forward, backward) if flowing else Node(name, 0, forward)

    def _norm(self, name: str, norm: Norm, width: int, flowing: bool) -> Node:
        """The sum is kept (or what comes in, where there is nothing to add) and one number a token, two by LayerNorm.

        width: features of the result, with room.

        "norm of the same": one that reads what another norm of this step has kept already.
        """
        tokens, e = self.tokens, self.work.element
        normed = tokens.local * width * e
        added = 0 if name != "norm" else 2
        statistics = tokens.local * _STATISTIC * norm.statistics
        return self._node(
            name,
            (0 if name == "norm of the same" else tokens.stream) + statistics,
            Pass(live=2 * tokens.stream, traffic=(2 + added) * tokens.stream, calls=1),
            Pass(live=2 * tokens.stream + normed, traffic=4 * tokens.stream, calls=1),
            flowing,
        )

    def _linears(self, group: Group, source: str, flowing: bool, *, fused: bool = False, read: bool = False) -> Node:
        """What the group is given is kept where there is an A, and z apart from it where it has no room for z.

        source  what the group is given: "normed", x with room (q k v, gate up); x alone, the result of attention, of an
                activation or the residual stream: "kept" by another, "recomputed" in backward, or "new"; "gated":
                gate_up, of which it makes x, and which it keeps also for the gradient
        fused   the backward passes of gate up and down are one pass through what is gated
        read    what reads the result keeps it
        """
        tokens, e = self.tokens, self.work.element
        gathers, gated, normed = tokens.gathers and not group.row_parallel, source == "gated", source == "normed"
        alone = not gated and not normed
        held = tokens.full if group.row_parallel else tokens.local
        x = held * (group.inputs + group.room) * e
        if gated:
            kept = 2 * held * group.inputs * e
        elif alone:
            kept = held * group.inputs * e if group.rank and source != "kept" else 0
        else:
            kept = x if group.rank else 0
        if group.rank and (gathers or group.row_parallel or alone):
            kept += tokens.full * group.room * e
        device = self.shape.device_type
        reads_z = group.rank and not (gated and fuses_down(device, group.rank))  # x again, for z
        fused = bool(group.rank) and fused  # one pass through what is gated, with dB of gate and up
        made = x if gated or (alone and group.room) else 0  # with room, for the forward only
        y_full, dx_full = tokens.full * group.output * e, tokens.full * (group.inputs + group.room) * e
        reads_x = held * group.inputs * e
        in_region = self.shape.device_type == "cuda"  # what is gathered lies in the memory of the exchange there
        matrix = 2 * tokens.full * (group.inputs + group.room) * group.output
        branch = 2 * tokens.full * group.rank
        messages = self._messages(group, group.row_parallel, matrix, True)
        forward = Pass(
            live=(tokens.full * (group.inputs + group.room) * e if gathers and not in_region else 0) + made + y_full,
            flops=matrix + branch * group.inputs,
            traffic=(reads_x if reads_z else 0) + (3 * reads_x if gated else 0),
            messages=messages,
            calls=1 + gated + (group.rank > 0) + (group.row_parallel and group.biases > 0) + len(messages),
        )
        forward = on_base(forward, group, self.work, device, tokens.full, matrix, backward=False)
        # The gradient of the residual stream waits meanwhile, for a row-parallel group it is dy itself.
        gradients = group.trained * (e + _STATISTIC)
        dy = (y_full if tokens.gathers and not in_region else 0) if group.row_parallel else y_full
        scattered = tokens.local * (group.inputs + group.room) * e if gathers else 0
        needs_dx = flowing
        after = 0  # beside dX: the gradient of gate_up and x again; or what goes on from o
        if gated:
            after = (3 if group.rank and not fused else 2) * reads_x
        elif alone and group.rank:
            after = reads_x
        traffic = y_full + reads_x + (2 * reads_x if needs_dx else 0) if group.rank else 0
        if fused and needs_dx and gated:
            traffic = y_full
        elif fused and normed:
            traffic -= y_full
        product = matrix if needs_dx else 2 * tokens.full * group.room * group.output
        messages = self._messages(group, not group.row_parallel, product, needs_dx)
        backward = Pass(
            live=tokens.stream + dy + (dx_full + scattered + after if needs_dx else 0) + gradients,
            flops=product + branch * (group.inputs * (2 if needs_dx else 1) + group.output),
            traffic=traffic + (5 * reads_x if gated and needs_dx else 0),
            messages=messages,
            # dX; dx with dA; dB of each branch, where no other pass makes it.
            calls=1 + (group.rank > 0) + (0 if fused and normed else group.adapted) + len(messages),
        )
        if needs_dx:  # else the product is with the branch alone
            backward = on_base(backward, group, self.work, device, tokens.full, product, backward=True)
        node = self._node("linears", kept, forward, backward, flowing or group.trains)
        local = tokens.local if group.row_parallel and tokens.gathers else tokens.full
        return with_factors(node, group, local, e, keeps=not read)

    def _messages(self, group: Group, sums: bool, product: float, whole: bool) -> tuple[Message, ...]:
        """Of a product whose terms are summed over the ranks (`sums`), or that wants all tokens. whole: not z alone."""
        tokens = self.tokens
        if self.shape.tp == 1:
            return ()
        if tokens.gathers:
            size = tokens.whole if whole or not sums else tokens.full * group.room * self.work.element
            return (Message("scatter" if sums else "gather", size, product),) if size else ()
        return (Message("reduce", tokens.whole),) if sums and whole else ()

    def _fused(self, mixer: MLP) -> bool:
        """Whether the backward passes of down's branch, of what is gated and of gate's and up's B are one."""
        down, ups = mixer.down, [rank for rank in mixer.up.ranks if rank]
        return down.rank > 0 and len(ups) != 1 and fuses_gated(self.shape.device_type, down.rank, ups)

    def _core(self, layer: Attention, flowing: bool) -> Node:
        """Rotation and attention: q, k, v, the result and its logsumexp; with recompute, q k v as they came."""
        work, tokens, e = self.work, self.tokens, self.work.element
        full, dim = tokens.full, layer.head_dim
        q, kv = full * layer.heads * dim * e, full * layer.kv_heads * dim * e
        qkv, statistics = q + 2 * kv, full * layer.heads * _STATISTIC
        flops = 4 * layer.heads * dim * work.seen(layer.window) * full
        kept = qkv + q + statistics
        if layer.qk_rows:
            # The norms keep what they read, copies of q and k for kernels, else views of qkv; v is a view of qkv.
            copies = q + kv if layer.qk_kernel and _kernels(self.shape.device_type) else 0
            kept += copies + full * layer.qk_rows * layer.qk_statistics * _STATISTIC + (qkv - kv)
        dout = q
        workspace = full * layer.heads * dim * 4  # dq is summed in float32
        sums = (Message("reduce", full * _STATISTIC),) * 2 if layer.qk_across and self.shape.tp > 1 else ()
        core = self._node(
            "attention",
            kept,
            Pass(live=qkv, attention=flops, traffic=2 * qkv, messages=sums, calls=4),
            Pass(
                live=tokens.stream + dout + max(q + qkv + workspace, 2 * qkv),
                attention=2.5 * flops,
                traffic=2 * q + 2 * qkv,
                messages=sums,
                calls=4,
            ),
            flowing,
        )
        if work.recompute != "selective" or not flowing:
            return core
        return _computed_again("attention", [core], qkv, tokens, tokens.stream + dout)


def _kernels(device_type: str) -> bool:
    return device_type == "cuda" or extension.has_kernels(device_type)


def _output(tokens: _Tokens, flowing: bool) -> Node:
    """What the next stage reads; its gradient comes back."""
    add = Pass(live=tokens.stream, traffic=3 * tokens.stream, calls=1)
    return Node("output", tokens.stream if flowing else 0, add, Pass(live=tokens.stream) if flowing else NOTHING)


def _tail(shape: Shape, work: Workload, tokens: _Tokens, flowing: bool) -> list[Node]:
    """Final norm and loss: the logits live chunk by chunk, the gradient of the hidden states comes out of forward."""
    e, rows = work.element, shape.classes or shape.vocabulary
    labelled = round(tokens.full * work.labelled)
    chunk = min(labelled, max(1, CHUNK_LOGITS.get(shape.device_type, CHUNK_LOGITS["cpu"]) // rows))
    logits = chunk * rows * e * (1 + shape.capped)
    read, whole = tokens.local * shape.width * e, tokens.full * shape.width * e  # what the head reads
    gathered = whole if tokens.gathers else 0
    parts = 0 if work.labelled == 1.0 else 2 * chunk * shape.width * e
    product = 2 * labelled * shape.width * rows
    before: tuple[Message, ...] = ()
    after: tuple[Message, ...] = (Message("reduce", whole),) if shape.tp > 1 else ()
    if tokens.gathers:
        before, after = (Message("gather", whole),), (Message("scatter", whole),)
    norm = _output(tokens, flowing)
    if shape.final_norm is not None:
        norm = Node(
            "final norm",
            tokens.stream + tokens.local * _STATISTIC * shape.final_norm.statistics if flowing else 0,
            Pass(live=2 * tokens.stream, traffic=4 * tokens.stream, calls=1),
            Pass(live=2 * tokens.stream, traffic=3 * tokens.stream, calls=1) if flowing else NOTHING,
        )
    loss = Node(
        "loss",
        whole if flowing else 0,
        Pass(
            live=read + gathered + logits + parts,
            flops=product * (2 if flowing else 1),
            traffic=3 * labelled * rows * e,
            messages=before,
            calls=12,
        ),
        Pass(
            live=whole + (read if tokens.gathers else 0),
            traffic=2 * whole,
            messages=after,
            calls=2,
        )
        if flowing
        else NOTHING,
    )
    return [norm, loss]
