"""What a stage does, one thing at a time, and who is at the other end of a message."""

from __future__ import annotations

from typing import NamedTuple

FORWARD = "forward"
RECOMPUTE = "recompute"
BACKWARD = "backward"
SEND_FORWARD = "send_forward"
RECV_FORWARD = "recv_forward"
SEND_BACKWARD = "send_backward"
RECV_BACKWARD = "recv_backward"

COMPUTE = frozenset((FORWARD, RECOMPUTE, BACKWARD))
SENDS = frozenset((SEND_FORWARD, SEND_BACKWARD))
RECEIVES = frozenset((RECV_FORWARD, RECV_BACKWARD))

_OTHER_END = {  # and how far the other end is up the model
    SEND_FORWARD: (RECV_FORWARD, 1),
    RECV_FORWARD: (SEND_FORWARD, -1),
    SEND_BACKWARD: (RECV_BACKWARD, -1),
    RECV_BACKWARD: (SEND_BACKWARD, 1),
}


class Action(NamedTuple):
    """One thing a stage does for one microbatch and one of its chunks of layers.

    op     forward, recompute, backward; send_forward: the activation that this forward gave, recv_forward: the one it
           reads; send_backward: the gradient that this backward gave, recv_backward: the one it reads
    chunk  0 .. chunks - 1: chunk c of stage s of p is part c p + s of the model's c p parts, in their order
    """

    op: str
    microbatch: int
    chunk: int = 0


def part_of(stage: int, stages: int, chunk: int) -> int:
    """Return which part of the model a chunk is, counted from the embedding."""
    return chunk * stages + stage


def input_of(stage: int, stages: int, chunks: int, compute: Action) -> Action | None:
    """Return the receive whose tensor `compute` needs; None where it needs none."""
    part = part_of(stage, stages, compute.chunk)
    if compute.op == FORWARD and part > 0:
        return Action(RECV_FORWARD, compute.microbatch, compute.chunk)
    if compute.op == BACKWARD and part < stages * chunks - 1:
        return Action(RECV_BACKWARD, compute.microbatch, compute.chunk)
    return None


def output_of(stage: int, stages: int, chunks: int, floor: int, compute: Action) -> Action | None:
    """Return the send of what `compute` gives; None where nobody wants it. floor: the first part that is trained."""
    part = part_of(stage, stages, compute.chunk)
    if compute.op == FORWARD and part < stages * chunks - 1:
        return Action(SEND_FORWARD, compute.microbatch, compute.chunk)
    if compute.op == BACKWARD and part > floor:
        return Action(SEND_BACKWARD, compute.microbatch, compute.chunk)
    return None


def other_end(stage: int, stages: int, message: Action) -> tuple[int, Action]:
    """Return (stage, action) at the other end of a send or a receive. The last stage's chunk c feeds the first's c + 1.
    """
    op, step = _OTHER_END[message.op]
    part = message.chunk * stages + stage + step
    return part % stages, Action(op, message.microbatch, part // stages)
