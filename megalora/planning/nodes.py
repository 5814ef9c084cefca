"""What a stage computes and keeps for one microbatch, autograd node by autograd node.

It follows megalora/models and the ops below them: who changes what an op saves for its backward changes it here too
(tests/planning/test_nodes.py counts what autograd really holds and compares to the byte).

Legend: T tokens of the microbatch on this rank outside the linears, F all its tokens (T = F without sequence
parallelism), e bytes of an element in the compute dtype, C room of a group (see megalora.ops.lora_linear).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from megalora.ops import extension
from megalora.ops.activations import KEEPS_RESULT
from megalora.ops.lora_backward import fuses_gated
from megalora.ops.swiglu import fuses_down
from megalora.parallel.loss import CHUNK_LOGITS
from megalora.planning.quantised import on_base
from megalora.planning.shapes import MLP, Attention, Group, Layer, Shape

_STATISTIC = 4  # bytes of a float32: the norms' inverses, the logsumexp of attention


@dataclass(frozen=True)
class Workload:
    """One microbatch, and how it is run.

    rows, seq_length   F = rows * seq_length
    context            keys that a token sees on average, without a window; None: each row is one document
    labelled           part of the tokens that have a label: the head is computed for these only
    element            bytes of an element in the compute dtype (2 for bfloat16)
    sequence_parallel  whether activations between the linears are cut over tp
    recompute          "none", "selective" or "full"
    base_format        of the frozen linears, one of choices.BASE_FORMATS
    """

    rows: int
    seq_length: int
    context: float | None = None
    labelled: float = 1.0
    element: int = 2
    sequence_parallel: bool = False
    recompute: str = "none"
    base_format: str = "dense"

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_length

    def seen(self, window: int | None) -> float:
        """Keys that a token sees on average in a layer with that window."""
        length = self.seq_length
        if window is None or window >= length:
            return (length + 1) / 2 if self.context is None else self.context
        whole = (window * (window + 1) / 2 + (length - window) * window) / length
        return whole if self.context is None else min(whole, self.context)


@dataclass(frozen=True)
class Message:
    """One message between tensor-parallel ranks.

    kind    "reduce": a sum that all get; "gather", "scatter": of sequence parallelism
    size    bytes of the whole activation
    beside  FLOPs of the product that it may run beside (see megalora.parallel.exchange); 0: it waits alone
    """

    kind: str
    size: int
    beside: float = 0.0


@dataclass(frozen=True)
class Pass:
    """What one pass through a node, forward or backward, takes.

    live       bytes that exist while it runs, besides what nodes keep: gradients on their way, workspaces
    flops      of matrix products
    flops8     of matrix products in e4m3
    attention  FLOPs of attention
    traffic    bytes that all else reads and writes
    messages   over tensor parallel
    calls      operations that the host issues
    """

    live: int = 0
    flops: float = 0
    flops8: float = 0
    attention: float = 0
    traffic: float = 0
    messages: tuple[Message, ...] = ()
    calls: int = 0


NOTHING = Pass()


@dataclass(frozen=True)
class Node:
    """One autograd node, or a part that is computed again in backward: then `inner` is what that makes.

    kept  bytes from its forward to the end of its backward
    """

    name: str
    kept: int
    forward: Pass
    backward: Pass = NOTHING
    inner: tuple[Node, ...] = field(default=())


def chunk_nodes(shape: Shape, layers: range, work: Workload, *, first: bool, last: bool) -> list[Node]:
    """The nodes of layers `layers`, in order of their forward; with `first` the embedding, with `last` norm and head.

    A chunk is what one stage holds, or one of its parts under an interleaved schedule.
    """
    tokens, bare = _Tokens.of(shape, work), replace(shape, layers=())
    flowing = shape.lowest < layers.start  # whether what comes in requires a gradient
    nodes: list[Node] = []
    if first:
        summed = (Message("reduce", tokens.whole),) if shape.tp > 1 else ()
        nodes.append(Node("embedding", 0, Pass(traffic=2 * tokens.stream, messages=summed, calls=1)))
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


def kept_bytes(nodes: list[Node]) -> int:
    """What a microbatch between its forward and its backward holds."""
    return sum(node.kept for node in nodes)


def peak_bytes(nodes: list[Node], base: int = 0, gradient: int = 0) -> int:
    """The most that is held at once during the forward and then the backward of one microbatch.

    base      what else is held
    gradient  held during the forward only: the gradient that waits for a part that is computed again
    """
    top = running = base
    for node in nodes:
        running += node.kept
        top = max(top, running + gradient + node.forward.live)
    for node in reversed(nodes):
        top = max(top, running + node.backward.live)
        if node.inner:
            top = max(top, peak_bytes(list(node.inner), running, node.backward.live))
        running -= node.kept
    return top


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
            for mixer in step.mixers:
                nodes.append(self._norm(name, step.kind, mixer.groups[0], flowing))
                added = self._attention(mixer, flowing) if isinstance(mixer, Attention) else self._mlp(mixer, flowing)
                nodes += added
                name = "norm of the same"
            flowing = flowing or any(group.trains for mixer in step.mixers for group in mixer.groups)
        return nodes

    def _attention(self, mixer: Attention, flowing: bool) -> list[Node]:
        after = flowing or mixer.qkv.trains
        source = "recomputed" if self.work.recompute == "selective" and after else "kept" if after else "new"
        return [
            self._linears(mixer.qkv, "normed", flowing),
            self._core(mixer, after),
            self._linears(mixer.out, source, after),
        ]

    def _mlp(self, mixer: MLP, flowing: bool) -> list[Node]:
        after = flowing or mixer.up.trains
        if mixer.gated:
            fused = self._fused(mixer)
            return [
                self._linears(mixer.up, "normed", flowing, fused=fused),
                self._linears(mixer.down, "gated", after, fused=fused),
            ]
        # Some keep their result, which down reads; the others keep what they read.
        kept = self.tokens.full * mixer.down.inputs * self.work.element * (mixer.act != "linear")
        both = Pass(live=kept, traffic=2 * kept, calls=1)
        act = self._node("activation", kept, both, replace(both, live=2 * kept, traffic=3 * kept), after)
        source = "kept" if mixer.act in KEEPS_RESULT and after else "new"
        return [self._linears(mixer.up, "normed", flowing), act, self._linears(mixer.down, source, after)]

    def _node(self, name: str, kept: int, forward: Pass, backward: Pass, flowing: bool) -> Node:
        return Node(name, kept, forward, backward) if flowing else Node(name, 0, forward)

    def _norm(self, name: str, kind: str, group: Group, flowing: bool) -> Node:
        """The sum is kept (or what comes in, where there is nothing to add) and one number a token, two by LayerNorm.

        "norm of the same": one that reads what another norm of this step has kept already.
        """
        tokens, e = self.tokens, self.work.element
        normed = tokens.local * (group.inputs + group.room) * e
        added = 0 if name != "norm" else 2
        statistics = tokens.local * _STATISTIC * (2 if kind == "layer" else 1)
        return self._node(
            name,
            (0 if name == "norm of the same" else tokens.stream) + statistics,
            Pass(live=2 * tokens.stream, traffic=(2 + added) * tokens.stream, calls=1),
            Pass(live=2 * tokens.stream + normed, traffic=4 * tokens.stream, calls=1),
            flowing,
        )

    def _linears(self, group: Group, source: str, flowing: bool, *, fused: bool = False) -> Node:
        """What the group is given is kept where there is an A, and z apart from it where it has no room for z.

        source  what the group is given: "normed", x with room (q k v, gate up); x alone, the result of attention or of
                an activation: "kept" by what made it, "recomputed" in backward, or "new"; "gated": gate_up, of which
                it makes x, and which it keeps also for the gradient
        fused   the backward passes of gate up and down are one pass through what is gated
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
        if group.rank and (gathers or group.row_parallel):
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
        return self._node("linears", kept, forward, backward, flowing or group.trains)

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
        if layer.qk_norm:
            # The norms keep what they read, copies of q and k for kernels, else views of qkv; v is a view of qkv.
            copies = q + kv if _kernels(self.shape.device_type) else 0
            kept += copies + full * (layer.heads + layer.kv_heads) * _STATISTIC + (qkv - kv)
        dout = q
        workspace = full * layer.heads * dim * 4  # dq is summed in float32
        core = self._node(
            "attention",
            kept,
            Pass(live=qkv, attention=flops, traffic=2 * qkv, calls=4),
            Pass(
                live=tokens.stream + dout + max(q + qkv + workspace, 2 * qkv),
                attention=2.5 * flops,
                traffic=2 * q + 2 * qkv,
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
    e = work.element
    labelled = round(tokens.full * work.labelled)
    chunk = min(labelled, max(1, CHUNK_LOGITS.get(shape.device_type, CHUNK_LOGITS["cpu"]) // shape.vocabulary))
    logits = chunk * shape.vocabulary * e
    read, whole = tokens.local * shape.width * e, tokens.full * shape.width * e  # what the head reads
    gathered = whole if tokens.gathers else 0
    parts = 0 if work.labelled == 1.0 else 2 * chunk * shape.width * e
    product = 2 * labelled * shape.width * shape.vocabulary
    before: tuple[Message, ...] = ()
    after: tuple[Message, ...] = (Message("reduce", whole),) if shape.tp > 1 else ()
    if tokens.gathers:
        before, after = (Message("gather", whole),), (Message("scatter", whole),)
    norm = Node(
        "final norm",
        tokens.stream + tokens.local * _STATISTIC * (2 if shape.final_norm[1] == "layer" else 1) if flowing else 0,
        Pass(live=2 * tokens.stream, traffic=4 * tokens.stream, calls=1),
        Pass(live=2 * tokens.stream, traffic=3 * tokens.stream, calls=1) if flowing else NOTHING,
    )
    if shape.final_norm[1] == "none":
        norm = _output(tokens, flowing)
    loss = Node(
        "loss",
        whole if flowing else 0,
        Pass(
            live=read + gathered + logits + parts,
            flops=product * (2 if flowing else 1),
            traffic=3 * labelled * shape.vocabulary * e,
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
