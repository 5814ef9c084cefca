"""What a stage computes and keeps for one microbatch, autograd node by autograd node.

It follows megalora/models and the ops below them: who changes what an op saves for its backward changes it here too
(tests/planning/test_nodes.py counts what autograd really holds and compares to the byte).

Legend: T tokens of the microbatch on this rank outside the linears, F all its tokens (T = F without sequence
parallelism), e bytes of an element in the compute dtype, C room of a group (see megalora.ops.lora_linear).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megalora.ops.swiglu import fuses_down
from megalora.parallel.loss import chunk_rows
from megalora.planning.attention import attention_nodes
from megalora.planning.convolution import convolution_core
from megalora.planning.cross import cross_nodes
from megalora.planning.delta import delta_core
from megalora.planning.experts import experts_nodes
from megalora.planning.groups import Group, with_factors
from megalora.planning.latent import latent_nodes
from megalora.planning.mamba import mamba_core
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
    Recurrent,
)
from megalora.planning.mlp import mlp_nodes
from megalora.planning.node import NOTHING, Message, Node, Pass, Workload, host_bytes, kept_bytes, peak_bytes
from megalora.planning.quantised import on_base
from megalora.planning.recomputed import Run, attention_again, part_of, tiled
from megalora.planning.shapes import Shape
from megalora.planning.steps import Branch, Layer, Step
from megalora.planning.tokens import Tokens

__all__ = ["Message", "Node", "Pass", "Workload", "chunk_nodes", "host_bytes", "kept_bytes", "peak_bytes"]

_MADE_OF = {"gated": 2, "activated": 1}  # features that one of down's input is made of
_STATISTIC = 4  # bytes of a float32: the norms' inverses, the logsumexp of attention


def chunk_nodes(shape: Shape, layers: range, work: Workload, *, first: bool, last: bool) -> list[Node]:
    """Return the nodes of layers `layers`, in order of their forward; with `first` the embedding, with `last` norm and
    head.

    A chunk is what one stage holds, or one of its parts under an interleaved schedule.
    """
    tokens, bare = Tokens.of(shape, work), replace(shape, layers=())
    flowing = shape.lowest < layers.start  # whether what comes in requires a gradient
    nodes: list[Node] = []
    if first:
        summed = (Message("reduce", tokens.whole),) if shape.tp > 1 else ()
        passes = 2 if shape.scaled else 1
        nodes.append(Node("embedding", 0, Pass(traffic=2 * passes * tokens.stream, messages=summed, calls=passes)))
    for index in layers:
        layer, decodes = shape.layers[index], index >= shape.encoders
        entering = index in (layers.start, shape.encoders) or shape.layers[index - 1].leaves_one
        run = replace(work, recompute=work.level(index), offloaded=frozenset())
        if shape.encoders and index == shape.encoders:  # the decoder's stream begins; what the encoder leaves is kept
            memory = Tokens.of(shape, work.of_source).stream
            nodes.append(Node("memory", 2 * memory if flowing else 0, Pass(traffic=4 * memory, calls=2)))
        if shape.encoders:
            run = replace(run, source_flows=shape.lowest < shape.encoders) if decodes else run.of_source
        nodes += _layer_nodes(layer, bare, run, entering, flowing, index in work.offloaded)
        flowing = flowing or layer.trains
    nodes += _tail(shape, work, tokens, flowing) if last else [_output(Tokens.of(shape, work, work.sent), flowing)]
    # Rotation tables and token numbers of the microbatch: every layer reads the same ones.
    turned = sum(shape.rotary)
    nodes.append(Node("inputs", work.sent * (turned * work.element + 8) if flowing else 0, NOTHING))
    return nodes


# ---- the parts of a stage ----


@lru_cache(maxsize=4096)
def _layer_nodes(
    layer: Layer, shape: Shape, work: Workload, entering: bool, flowing: bool, offloads: bool
) -> tuple[Node, ...]:
    """Return the nodes of a layer.

    entering: it is the first of its chunk, so the residual stream comes in one piece; flowing: what comes in requires a
    gradient.
    """
    tokens = Tokens.of(shape, work)
    first = _LayerNodes(layer, shape, work, tokens, entering)
    runs = first.runs(flowing)
    if work.recompute not in ("mlp", "layer", "full") or not (flowing or layer.trains):
        return tuple(node for run in runs for node in run.nodes)
    size = work.tile // (tokens.full // tokens.local)
    # As backward makes them: the stream comes in one piece, and the last product of an MLP is not read.
    again = replace(first, entering=True, again=True).runs(flowing)
    if size and tokens.local > size:
        tile = replace(first, tokens=tokens.part(size), entering=True, again=True)
        again = [tiled(run, short, tokens.stream) for run, short in zip(again, tile.runs(flowing), strict=True)]
    if work.recompute == "mlp":
        pairs = zip(runs, again, strict=True)
        parts = [part_of([run], [second], tokens.stream) if run.by_token else run.nodes for run, second in pairs]
        return tuple(node for part in parts for node in part)
    kept = 0
    if work.recompute == "layer":
        kept = sum(node.result for run in runs for node in run.nodes)
        again = [attention_again(run) for run in again]
    return tuple(part_of(runs, again, tokens.stream, kept, offloads))


@dataclass(frozen=True)
class _LayerNodes:
    """shape: of the model, without its layers. again: as they run for the second time."""

    layer: Layer
    shape: Shape
    work: Workload
    tokens: Tokens
    entering: bool
    again: bool = False

    def runs(self, flowing: bool) -> list[Run]:
        """Return the nodes of each step."""
        found: list[Run] = []
        for number, step in enumerate(self.layer.steps):
            name = "norm of the input" if self.entering and (number == 0 or self.again) else "norm"
            nodes: list[Node] = []
            for branch in step.branches:
                mixer = branch.mixer
                source = "kept" if branch.shares else "made again" if self._makes_again(step) else "normed"
                if branch.norm is None:
                    nodes.append(self._sum(name))
                    source = "new"
                elif not branch.shares:
                    room = 0 if isinstance(mixer, Experts) else mixer.groups[0].room
                    nodes.append(self._norm(name, branch.norm, mixer.groups[0].inputs + room, flowing))
                nodes += self._mixer(mixer, source, flowing, branch.reads_result)
                nodes += self._behind(branch, flowing or any(group.trains for group in mixer.groups))
                name = "norm of the same"
            last = step.branches[-1]
            own = replace(last, output_norm=step.output_norm, post_norm=None, scaled=step.totals)
            nodes += self._behind(own, flowing or any(group.trains for m in step.mixers for group in m.groups))
            by_token = len(step.branches) == 1 and isinstance(last.mixer, MLP) and last.post_norm is None
            found.append(Run(nodes, by_token))
            flowing = flowing or any(group.trains for mixer in step.mixers for group in mixer.groups)
        return found

    @property
    def memory(self) -> Tokens:
        """What the encoder leaves."""
        return Tokens.of(self.shape, self.work.of_source)

    def _sum(self, name: str) -> Node:
        """Return the residual stream in one piece, for a mixer without a norm."""
        if name == "norm of the input":
            return Node("sum", 0, NOTHING)
        return Node("sum", 0, Pass(live=self.tokens.stream, traffic=3 * self.tokens.stream, calls=1))

    def _behind(self, branch: Branch, flowing: bool) -> list[Node]:
        """Return what is done to the result of a mixer: its norm keeps it."""
        stream, nodes = self.tokens.stream, []
        both = Pass(live=stream, traffic=2 * stream, calls=1)
        # On a GPU the norm that adds it does so in its own pass, and writes one gradient more.
        alone = self.shape.device_type != "cuda"
        forward = both if alone else Pass(live=stream)
        if branch.output_norm is not None:
            kept = stream + self.tokens.local * _STATISTIC * branch.output_norm.statistics
            nodes.append(self._node("output norm", kept, forward, replace(both, live=2 * stream), flowing))
        if branch.scaled:
            nodes.append(self._node("scale", 0, forward, both if alone else Pass(live=stream, traffic=stream), flowing))
        if branch.post_norm is not None:
            kept = stream + self.tokens.local * _STATISTIC * branch.post_norm.statistics
            nodes.append(self._node("norm of the sum", kept, both, replace(both, live=2 * stream), flowing))
        return nodes

    def _makes_again(self, step: Step) -> bool:
        """Return whether backward makes what the step's linears read again."""
        alone = len(step.branches) == 1 and isinstance(step.branches[0].mixer, Attention | MLP | Recurrent)
        return self.work.recompute in ("norms", "mlp") and alone and not self.again

    def _mixer(self, mixer: Mixer, source: str, flowing: bool, read: bool) -> list[Node]:
        """Return the nodes of a mixer. read: backward needs the mixer's result."""
        if isinstance(mixer, Attention):
            return attention_nodes(self, mixer, source, flowing)
        if isinstance(mixer, CrossAttention):
            return cross_nodes(self, mixer, source, flowing)
        if isinstance(mixer, LatentAttention):
            return latent_nodes(self, mixer, source, flowing)
        if isinstance(mixer, Recurrent):
            return self._recurrent(mixer, source, flowing)
        if isinstance(mixer, Experts):
            return experts_nodes(self, mixer, flowing)
        return mlp_nodes(self, mixer, source, flowing, unread=self.again and not read)

    def _recurrent(self, mixer: Recurrent, source: str, flowing: bool) -> list[Node]:
        """Return the nodes of a mixer that keeps a state."""
        after = flowing or mixer.inputs.trains
        if isinstance(mixer, DeltaAttention):
            core = delta_core(self, mixer, after)
        elif isinstance(mixer, GatedConvolution):
            core = convolution_core(self, mixer, after)
        else:
            core = mamba_core(self, mixer, after)
        inputs = self._linears(mixer.inputs, source, flowing, read=True)
        return [inputs, core, self._linears(mixer.out, "kept" if after else "new", after)]

    def _node(self, name: str, kept: int, forward: Pass, backward: Pass, flowing: bool) -> Node:
        return Node(name, kept, forward, backward) if flowing else Node(name, 0, forward)

    def _norm(self, name: str, norm: Norm, width: int, flowing: bool) -> Node:
        """Count a norm: the sum is kept (or what comes in, where there is nothing to add) and one number a token, two
        by LayerNorm.

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

    def _linears(
        self,
        group: Group,
        source: str,
        flowing: bool,
        *,
        fused: bool = False,
        read: bool = False,
        unread: bool = False,
    ) -> Node:
        """Count a group: what it is given is kept where there is an A, and z apart from it where it has no room for z.

        source  what the group is given: "normed", x with room (q k v, gate up), kept or "made again" in backward; x
                alone, the result of attention, of an activation or the residual stream: "kept" by another, "recomputed"
                in backward, or "new"; "gated": gate_up, of which it makes x, and which it keeps also for the gradient;
                "activated": the same of up alone
        fused   the backward passes of gate up and down are one pass through what is gated
        read    what reads the result keeps it
        unread  forward makes z alone
        """
        tokens, e = self.tokens, self.work.element
        again, parts = source == "made again", _MADE_OF.get(source, 0)
        gathers, normed = tokens.gathers and not group.row_parallel, again or source == "normed"
        alone = not parts and not normed
        held = tokens.full if group.row_parallel else tokens.local
        x = held * (group.inputs + group.room) * e
        if parts:
            kept = parts * held * group.inputs * e
        elif alone:
            kept = held * group.inputs * e if group.rank and source != "kept" else 0
        else:
            kept = x if group.rank and not again else 0
            kept += 0 if flowing or not (group.rank and again) else tokens.stream  # which the norm does not keep
        if group.rank and (gathers or group.row_parallel or alone):
            kept += tokens.full * group.room * e
        device = self.shape.device_type
        reads_z = group.rank and not (parts and fuses_down(device, group.rank))  # x again, for z
        fused = bool(group.rank) and fused  # one pass through what is gated, with dB of gate and up
        made = x if parts or (alone and group.room) else 0  # with room, for the forward only
        y_full, reads_x = tokens.full * group.output * e, held * group.inputs * e
        in_region = self.shape.device_type == "cuda"  # what is gathered lies in the memory of the exchange there
        matrix = 2 * tokens.full * (group.inputs + group.room) * group.output
        branch = 2 * tokens.full * group.rank
        messages = self._messages(group, group.row_parallel, matrix, True)
        biases = group.row_parallel and group.biases > 0 and self.shape.tp > 1  # behind the sum, else in the product
        forward = Pass(
            live=(tokens.full * (group.inputs + group.room) * e if gathers and not in_region else 0) + made + y_full,
            flops=matrix + branch * group.inputs,
            traffic=(reads_x if reads_z else 0) + ((1 + parts) * reads_x if parts else 0),
            messages=messages,
            calls=1 + (parts > 0) + (group.rank > 0) + biases + len(messages),
        )
        forward = on_base(forward, group, self.work, device, tokens.full, matrix, backward=False)
        if unread and not group.magnitudes:
            forward = replace(forward, live=made, flops=branch * group.inputs, flops8=0, messages=())
        backward = self._linears_backward(group, source, flowing, fused)
        node = self._node("linears", kept, forward, backward, flowing or group.trains)
        local = tokens.local if group.row_parallel and tokens.gathers else tokens.full
        return with_factors(node, group, local, e, keeps=not read)

    def _linears_backward(self, group: Group, source: str, needs_dx: bool, fused: bool) -> Pass:
        """Return the backward pass of `_linears`."""
        tokens, e, device = self.tokens, self.work.element, self.shape.device_type
        again, parts = source == "made again", _MADE_OF.get(source, 0)
        gathers, normed = tokens.gathers and not group.row_parallel, again or source == "normed"
        held, in_region = tokens.full if group.row_parallel else tokens.local, device == "cuda"
        x, reads_x = held * (group.inputs + group.room) * e, held * group.inputs * e
        y_full, dx_full = tokens.full * group.output * e, tokens.full * (group.inputs + group.room) * e
        matrix = 2 * tokens.full * (group.inputs + group.room) * group.output
        branch = 2 * tokens.full * group.rank
        # The gradient of the residual stream waits meanwhile, for a row-parallel group it is dy itself.
        gradients = group.trained * (e + _STATISTIC)
        dy = (y_full if tokens.gathers and not in_region else 0) if group.row_parallel else y_full
        scattered = tokens.local * (group.inputs + group.room) * e if gathers else 0
        after = 0  # beside dX: the gradient of what x is made of and x again; or what goes on from o
        if parts:
            after = (parts + (group.rank > 0 and not fused)) * reads_x
        elif not normed and group.rank:
            after = reads_x
        traffic = y_full + reads_x + (2 * reads_x if needs_dx else 0) if group.rank else 0
        if fused and needs_dx and parts:
            traffic = y_full
        elif fused and normed:
            traffic -= y_full
        product = matrix if needs_dx else 2 * tokens.full * group.room * group.output
        messages = self._messages(group, not group.row_parallel, product, needs_dx)
        backward = Pass(
            live=tokens.stream + dy + (dx_full + scattered + after if needs_dx else 0) + gradients + x * again,
            flops=product + branch * (group.inputs * (2 if needs_dx else 1) + group.output),
            traffic=traffic + ((1 + 2 * parts) * reads_x if parts and needs_dx else 0) + (3 * reads_x if again else 0),
            messages=messages,
            # dX; dx with dA; dB of each branch, where no other pass makes it.
            calls=1 + (group.rank > 0) + (0 if fused and normed else group.adapted) + len(messages),
        )
        if needs_dx:  # else the product is with the branch alone
            return on_base(backward, group, self.work, device, tokens.full, product, backward=True)
        return backward

    def _messages(self, group: Group, sums: bool, product: float, whole: bool) -> tuple[Message, ...]:
        """Return those of a product whose terms are summed over the ranks (`sums`), or that wants all tokens. whole:
        not z alone.
        """
        tokens = self.tokens
        if self.shape.tp == 1:
            return ()
        if tokens.gathers:
            size = tokens.whole if whole or not sums else tokens.full * group.room * self.work.element
            return (Message("scatter" if sums else "gather", size, product),) if size else ()
        return (Message("reduce", tokens.whole),) if sums and whole else ()


def _output(tokens: Tokens, flowing: bool) -> Node:
    """Return what the next stage reads; its gradient comes back."""
    add = Pass(live=tokens.stream, traffic=3 * tokens.stream, calls=1)
    return Node("output", tokens.stream if flowing else 0, add, Pass(live=tokens.stream) if flowing else NOTHING)


def _tail(shape: Shape, work: Workload, tokens: Tokens, flowing: bool) -> list[Node]:
    """Count final norm and loss: the logits live chunk by chunk, the gradient of the hidden states comes out of
    forward.
    """
    e, rows = work.element, shape.classes or shape.vocabulary
    labelled = round(tokens.full * work.labelled)
    chunk = min(labelled, chunk_rows(shape.device_type, rows))
    logits = chunk * rows * e * (1 + (shape.capped and shape.device_type != "cuda"))
    read, whole = tokens.local * shape.width * e, tokens.full * shape.width * e  # what the head reads
    gathered = whole if tokens.gathers else 0
    parts = (1 if work.labelled == 1.0 else 2) * chunk * shape.width * e  # the gradient, and what is read
    product = 2 * labelled * shape.width * rows
    before: tuple[Message, ...] = ()
    after: tuple[Message, ...] = (Message("reduce", whole),) if shape.tp > 1 else ()
    if tokens.gathers:
        before, after = (Message("gather", whole),), (Message("scatter", whole),)
    norm = replace(_output(tokens, flowing), kept=0)  # the head keeps its own gradient, not what it reads
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
        Pass(live=whole + (read if tokens.gathers else 0), traffic=2 * whole, messages=after, calls=2)
        if flowing
        else NOTHING,
    )
    return [norm, loss]
