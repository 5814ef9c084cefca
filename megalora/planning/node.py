"""One node of what a stage computes: bytes and work of its two passes, and what a list of nodes holds at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megalora.models.recompute import TILE


@dataclass(frozen=True)
class Workload:
    """One microbatch, and how it is run.

    rows, seq_length   F = rows * seq_length, cut over `context_parallel` ranks
    context            keys up to it that a token sees on average, without a window; None: each row is one document
    labelled           part of the tokens that have a label: the head is computed for these only
    element            bytes of an element in the compute dtype (2 for bfloat16)
    sequence_parallel  whether activations between the linears are cut over tp
    recompute          what is computed again in backward, one of choices.RECOMPUTE_LEVELS: one for all layers, or that
                       of each layer of the model
    base_format        of the frozen linears, one of choices.BASE_FORMATS
    tile               tokens at once where what treats every token alone is computed again; 0: all
    offloaded          layers of which what is kept is in host memory
    source_length      tokens of a row of sources, which the encoder of an encoder-decoder reads; 0: there is none
    source_context     keys that a source's token sees on average, on both sides; None: all of a row's
    memory_context     keys that a target's token sees of its source; None: all of a row's
    source_flows       whether what the encoder leaves requires a gradient
    merges             whether on a GPU long documents go to cuDNN call by call (megalora.ops.merged_attention)
    """

    rows: int
    seq_length: int
    context: float | None = None
    labelled: float = 1.0
    element: int = 2
    sequence_parallel: bool = False
    recompute: str | tuple[str, ...] = "none"
    base_format: str = "dense"
    tile: int = TILE
    offloaded: frozenset[int] = frozenset()
    context_parallel: int = 1
    source_length: int = 0
    source_context: float | None = None
    memory_context: float | None = None
    source_flows: bool = False
    merges: bool = True

    @property
    def of_source(self) -> Workload:
        """What the encoder's layers do."""
        context = None if self.source_context is None else (self.source_context + 1) / 2  # those up to it
        return replace(self, seq_length=self.source_length, context=context, source_length=0)

    @property
    def memory_seen(self) -> float:
        return self.source_length if self.memory_context is None else self.memory_context

    def level(self, layer: int) -> str:
        """Return what of a layer is computed again."""
        return self.recompute if isinstance(self.recompute, str) else self.recompute[layer]

    @property
    def tokens(self) -> int:
        """Those that the last layer reads."""
        return self.rows * self.seq_length // self.context_parallel

    @property
    def sent(self) -> int:
        """Tokens of a message between stages: those of the sources too."""
        return self.tokens + self.rows * self.source_length

    def seen(self, window: int | None, chunk: int | None = None, causal: bool = True) -> float:
        """Return keys that a token sees on average in a layer with that window, or in chunks of that size; not causal:
        as many behind it too.
        """
        before = self._before(window, chunk)
        return before if causal else 2 * before - 1

    def _before(self, window: int | None, chunk: int | None) -> float:
        length = self.seq_length
        if chunk is not None and chunk < length:
            chunks, rest = divmod(length, chunk)
            keys = (chunks * chunk * (chunk + 1) + rest * (rest + 1)) / (2 * length)
            return keys if self.context is None else min(keys, self.context)
        if window is None or window >= length:
            return (length + 1) / 2 if self.context is None else self.context
        whole = (window * (window + 1) / 2 + (length - window) * window) / length
        return whole if self.context is None else min(whole, self.context)


@dataclass(frozen=True)
class Message:
    """One message between tensor-parallel ranks, or between context-parallel ones.

    kind    "reduce": a sum that all get; "gather", "scatter": of sequence parallelism; "context": keys and values that
            context-parallel ranks gather, or the sum of their gradients
    size    bytes of the whole activation
    ranks   of a "context" message
    beside  FLOPs of the product that it may run beside (see megalora.parallel.exchange); 0: it waits alone
    """

    kind: str
    size: int
    beside: float = 0.0
    ranks: int = 1


@dataclass(frozen=True)
class Pass:
    """What one pass through a node, forward or backward, takes.

    live       bytes that exist while it runs, besides what nodes keep: gradients on their way, workspaces
    flops      of matrix products
    flops8     of matrix products in e4m3; flops32: in 32-bit floats beside an element of 16
    attention  FLOPs of attention
    attended   the same where each token saw one key
    traffic    bytes that all else reads and writes
    messages   over tensor parallel
    calls      operations that the host issues
    """

    live: int = 0
    flops: float = 0
    flops8: float = 0
    flops32: float = 0
    attention: float = 0
    attended: float = 0
    traffic: float = 0
    messages: tuple[Message, ...] = ()
    calls: int = 0

    @property
    def of_backward(self) -> Pass:
        """The same with the attention of a backward pass: five products for the two of forward."""
        return replace(self, attention=2.5 * self.attention, attended=2.5 * self.attended)


NOTHING = Pass()


@dataclass(frozen=True)
class Node:
    """One autograd node, or a part that is computed again in backward: then `inner` is what that makes.

    kept     bytes from its forward to the end of its backward
    forward  where there is an `inner`: of the first run; inner has what the second run takes
    host     bytes that it keeps in host memory meanwhile
    result   bytes of `kept` that are the result of attention, with its statistics
    fetched  bytes that are on the device because of it: during its forward on their way out, during its backward back
    """

    name: str
    kept: int
    forward: Pass
    backward: Pass = NOTHING
    inner: tuple[Node, ...] = field(default=())
    result: int = 0
    host: int = 0
    fetched: int = 0


def kept_bytes(nodes: list[Node]) -> int:
    """Return what a microbatch between its forward and its backward holds."""
    return sum(node.kept for node in nodes)


def peak_bytes(nodes: list[Node], base: int = 0, gradient: int = 0) -> int:
    """Return the most that is held at once during the forward and then the backward of one microbatch.

    base      what else is held
    gradient  held during the forward only: the gradient that waits for a part that is computed again
    """
    top = running = base
    for node in nodes:
        running += node.kept
        top = max(top, running + gradient + node.forward.live + node.fetched)
    for node in reversed(nodes):
        top = max(top, running + node.backward.live + node.fetched)
        if node.inner:
            top = max(top, peak_bytes(list(node.inner), running + node.fetched, node.backward.live))
        running -= node.kept
    return top


def host_bytes(nodes: list[Node]) -> int:
    """Return what a microbatch between its forward and its backward holds in host memory."""
    return sum(node.host for node in nodes)


def sum_of(passes: Iterable[Pass]) -> Pass:
    """Return passes one after another as one."""
    passes = list(passes)
    return Pass(
        max((p.live for p in passes), default=0),
        sum(p.flops for p in passes),
        sum(p.flops8 for p in passes),
        sum(p.flops32 for p in passes),
        sum(p.attention for p in passes),
        sum(p.attended for p in passes),
        sum(p.traffic for p in passes),
        tuple(message for p in passes for message in p.messages),
        sum(p.calls for p in passes),
    )
