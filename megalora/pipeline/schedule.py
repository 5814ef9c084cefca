"""Pipeline schedules as data: a pure function gives each stage its list of actions, the runner executes it.

A schedule can be printed, checked and simulated without a process. Neighbouring communication actions are posted
together, so a send and a receive that stand side by side never wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

FORWARD = "forward"
BACKWARD = "backward"
RECV_FORWARD = "recv_forward"
SEND_FORWARD = "send_forward"
RECV_BACKWARD = "recv_backward"
SEND_BACKWARD = "send_backward"
COMMUNICATION = frozenset((RECV_FORWARD, SEND_FORWARD, RECV_BACKWARD, SEND_BACKWARD))


@dataclass(frozen=True)
class Action:
    """One thing a stage does for one microbatch (of one of its chunks of layers)."""

    op: str
    microbatch: int
    chunk: int = 0


def _forward(stage: int, stages: int, m: int) -> tuple[list[Action], list[Action], list[Action]]:
    """(before, compute, after) of the forward pass of microbatch m."""
    before = [Action(RECV_FORWARD, m)] if stage > 0 else []
    after = [Action(SEND_FORWARD, m)] if stage < stages - 1 else []
    return before, [Action(FORWARD, m)], after


def _backward(stage: int, stages: int, m: int, floor: int) -> tuple[list[Action], list[Action], list[Action]]:
    """(before, compute, after) of the backward pass; nothing on a stage below `floor`."""
    if stage < floor:
        return [], [], []
    before = [Action(RECV_BACKWARD, m)] if stage < stages - 1 else []
    after = [Action(SEND_BACKWARD, m)] if stage > floor else []
    return before, [Action(BACKWARD, m)], after


def gpipe(stage: int, stages: int, microbatches: int, floor: int = 0) -> list[Action]:
    """All forwards, then all backwards in the same order (Huang et al. 2019). Keeps every microbatch in flight."""
    actions = []
    for m in range(microbatches):
        actions += sum(_forward(stage, stages, m), [])
    for m in range(microbatches):
        actions += sum(_backward(stage, stages, m, floor), [])
    return actions


def one_f_one_b(stage: int, stages: int, microbatches: int, floor: int = 0) -> list[Action]:
    """1F1B (Narayanan et al. 2019): stage s keeps at most min(stages - s, microbatches) microbatches in flight."""
    warmup = min(stages - stage - 1, microbatches)
    actions = []
    for m in range(warmup):
        actions += sum(_forward(stage, stages, m), [])
    for m in range(warmup, microbatches):
        f_before, f_compute, f_after = _forward(stage, stages, m)
        b_before, b_compute, b_after = _backward(stage, stages, m - warmup, floor)
        # The gradient of the microbatch before goes up while the next activation comes down: one paired exchange.
        actions += f_before + f_compute + f_after + b_before + b_compute + b_after
    for m in range(microbatches - warmup, microbatches):
        actions += sum(_backward(stage, stages, m, floor), [])
    return actions


SCHEDULES: Mapping[str, Callable[..., list[Action]]] = {"1f1b": one_f_one_b, "gpipe": gpipe}


def forward_only(stage: int, stages: int, microbatches: int) -> list[Action]:
    """Every forward, nothing else (evaluation)."""
    return [action for m in range(microbatches) for action in sum(_forward(stage, stages, m), [])]


def peak_in_flight(actions: list[Action]) -> int:
    """The most microbatches whose forward ran and whose backward did not, at any time."""
    depth = peak = 0
    for action in actions:
        depth += {FORWARD: 1, BACKWARD: -1}.get(action.op, 0)
        peak = max(peak, depth)
    return peak
