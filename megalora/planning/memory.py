"""Bytes that a rank holds at most during a step, as torch's allocator counts them (torch.cuda.max_memory_allocated).

Beside them a GPU's memory for what tensor-parallel ranks send each other (megalora.parallel.exchange). What else lies
outside of it, CUDA's context, NCCL's buffers and the allocator's fragments, is not counted here: a plan
leaves room for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalora.planning.nodes import Workload, chunk_nodes, kept_bytes, peak_bytes
from megalora.planning.quantised import beside_bytes, linear_bytes, scratch_bytes
from megalora.planning.shapes import Shape
from megalora.planning.tokens import Tokens

# cuBLAS keeps this much on Hopper, through torch's allocator (torch.backends.cuda, CUBLAS_WORKSPACE_CONFIG).
_GEMM_WORKSPACE = {"cuda": 32 << 20}
_MASTER = 4  # bytes of an element of a master, a gradient, a moment: float32
_MESSAGES = 6  # hidden states on their way at once: two sends and a receive each of activations and of gradients


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of the step that needs the most.

    weights      frozen, in the compute dtype or the base's format, with the columns that carry s B
    adapters     masters, and the copies of A (and biases) in the compute dtype
    optimizer    gradients and two moments
    activations  of the microbatches in flight, and what the one at work needs besides
    buffers      messages between stages and of sequence parallelism, workspace of the matrix products, the scratch that
                 quantised weights are decoded or turned in
    """

    weights: int
    adapters: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.optimizer + self.activations + self.buffers


def exchange_bytes(shape: Shape, tokens: int, element: int) -> int:
    """Return the bytes of the largest activation of `tokens` tokens that is gathered or scattered, with room for z:
    what every rank of the model shares with its tensor-parallel neighbours (megalora.parallel.peer_memory).
    """
    room = max((group.room for layer in shape.layers for group in layer.groups), default=0)
    return tokens * (shape.hidden + room) * element


def stage_memory(
    shape: Shape,
    chunks: Sequence[range],
    work: Workload,
    *,
    first: bool,
    last: bool,
    in_flight: int = 1,
    inputs: int = 0,
) -> Memory:
    """Return the memory of a stage that holds `chunks`, in the order of the model.

    first, last  whether its first chunk begins the model, and its last one ends it
    in_flight    microbatches (times chunks) of which it keeps all that backward reads, at most
    inputs       microbatches of which it keeps what came in, to compute the rest again
    """
    layers = [shape.layers[i] for chunk in chunks for i in chunk]
    e = work.element
    ends = shape.embedding + shape.before if first else 0
    prefix = shape.prefix[0] * e + shape.prefix[1] * max(e, 4) if first else 0
    final = 0 if shape.final_norm is None else shape.final_norm.elements
    ends += shape.head + final + shape.behind if last else 0
    if first and last and shape.shared:
        ends -= shape.embedding
    words = [shape.words[i] for i, here in enumerate((first, last)) if here]
    ends -= sum(shape.embedding for _, whole in words if whole)
    frozen, trained = sum(layer.frozen for layer in layers), shape.trained(chunks, first=first, last=last)
    counted = [pair for layer in layers for pair in layer.counted]
    room = sum(times * group.room * group.output for times, group in counted)
    linears = sum(times * group.inputs * group.output for times, group in counted)
    copies = sum(layer.copies for layer in layers) - room
    nodes = [
        chunk_nodes(shape, chunk, work, first=first and i == 0, last=last and i == len(chunks) - 1)
        for i, chunk in enumerate(chunks)
    ]
    waiting = max(kept_bytes(part) for part in nodes)
    stream = work.sent * shape.hidden * e // (shape.tp if work.sequence_parallel else 1)
    alone = first and last and len(chunks) == 1
    exchanges = work.sequence_parallel and shape.tp > 1 and shape.device_type == "cuda"
    exchanged = exchange_bytes(shape, max(work.tokens, work.sent - work.tokens), e) if exchanges else 0
    held = sum(times * linear_bytes(group, work.base_format, e) for times, group in counted)
    held += sum(beside_bytes(g, work.base_format, e, shape.device_type) for times, g in counted if times == 1)
    at_once = min(Tokens.of(shape, work).full, work.tile or work.tokens)
    return Memory(
        weights=(frozen - linears + room + ends) * e + held + prefix,
        adapters=trained * _MASTER + copies * e,
        optimizer=3 * trained * _MASTER,
        activations=max(peak_bytes(part) for part in nodes)
        + sum(elements for elements, _ in words) * _MASTER  # their gradient of one microbatch
        + max(0, in_flight - 1) * waiting
        + (0 if first else max(0, inputs - 1) * stream),
        buffers=_GEMM_WORKSPACE.get(shape.device_type, 0) + (0 if alone else _MESSAGES * stream) + exchanged
        + scratch_bytes(counted, work.base_format, e, shape.device_type, at_once),
    )
