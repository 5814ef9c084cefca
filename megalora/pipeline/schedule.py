"""Pipeline schedules as data: a pure function gives each stage its list of actions, the runner executes it.

A schedule is the order in which each stage computes; the messages follow from the orders of all stages. It can be
printed, drawn, checked and simulated without a process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megalora.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    FORWARD,
    RECOMPUTE,
    SENDS,
    Action,
    input_of,
    other_end,
    output_of,
    part_of,
)
from megalora.pipeline.simulate import simulate

Programme = tuple[tuple[Action, ...], ...]  # the actions of every stage


@dataclass(frozen=True)
class Peak:
    """The most that a stage keeps at once, in microbatches of one chunk of layers.

    activations  of which it keeps all that backward reads
    inputs       of which it keeps what came in, to compute the rest again
    """

    activations: int
    inputs: int = 0


@dataclass(frozen=True)
class Schedule:
    """An order of forwards and backwards for any number of stages and microbatches.

    order(stage, stages, microbatches, chunks)               the computes of a stage, as if all of it were trained
    in_flight(stage, stages, microbatches, chunks, trained)  the most microbatches x chunks that are past their forward
                                                             and not past their backward; of the stage's chunks the
                                                             upper `trained` have a backward, at least one
    recomputes(stage, stages)                                whether a forward keeps its input alone, and a recompute
                                                             goes before the backward
    chunked                                                  whether a stage can hold several chunks of layers
    """

    name: str
    order: Callable[[int, int, int, int], list[Action]]
    in_flight: Callable[[int, int, int, int, int], int]
    recomputes: Callable[[int, int], bool] = lambda stage, stages: False
    chunked: bool = False

    @lru_cache(maxsize=32)  # noqa: B019  (schedules live as long as the program)
    def programme(self, stages: int, microbatches: int, floor: int = 0, chunks: int = 1) -> Programme:
        """Return the actions of every stage, messages included.

        floor  the first part of the model (see actions.part_of) that has something to train: the parts before it run
               no backward, and neither they nor it send a gradient
        chunks of each stage; more than 1 only where `chunked`
        """
        assert chunks == 1 or (self.chunked and stages > 1), (self.name, stages, chunks)

        def wanted(stage: int, action: Action) -> bool:
            return action.op == FORWARD or part_of(stage, stages, action.chunk) >= floor

        orders = [
            [action for action in self.order(stage, stages, microbatches, chunks) if wanted(stage, action)]
            for stage in range(stages)
        ]
        return with_messages(orders, floor, chunks)

    def peak(self, stage: int, stages: int, microbatches: int, floor: int = 0, chunks: int = 1) -> Peak:
        """Return what the stage keeps at most, by formula; tests count it in the programme."""
        trained = sum(part_of(stage, stages, chunk) >= floor for chunk in range(chunks))
        if not trained:
            return Peak(0)
        count = self.in_flight(stage, stages, microbatches, chunks, trained)
        return Peak(1, count) if self.recomputes(stage, stages) else Peak(count)


    def waiting(self, stages: int, microbatches: int, floor: int, shares: Sequence[float]) -> float:
        """Return the share of their time in which the stages wait for one another, 0 to 1.

        shares  of a microbatch's compute, by part of the model; of a trained part half is its forward, and a recompute
                takes as long again. Messages are reckoned to take no time.
        """

        def seconds(stage: int, action: Action) -> float:
            part = part_of(stage, stages, action.chunk)
            return shares[part] / (2 if part >= floor else 1) if action.op in COMPUTE else 0.0

        programme = self.programme(stages, microbatches, floor, len(shares) // stages)
        return simulate(programme, seconds).bubble


def with_messages(orders: Sequence[Sequence[Action]], floor: int, chunks: int) -> Programme:
    """Put sends and receives between the computes of all stages.

    All stages run in a simulation, and every message is put, on both its ends, at the moment its tensor is made. So
    there is one order of all computes and messages that each list is a part of, and no list can stand still, even
    where a send lasts until its receive has begun. The simulation counts each compute alike, and a forward that has
    no backward for as long as the others' work on a microbatch: it could run ahead, and would only fill memory.
    """
    stages = len(orders)
    work = max(len({action.op for action in order}) for order in orders)

    def seconds(stage: int, action: Action) -> float:
        if action.op not in COMPUTE:
            return 0.0
        return 1.0 if part_of(stage, stages, action.chunk) >= floor else float(work)

    naive = []
    for stage, order in enumerate(orders):
        actions: list[Action] = []
        for compute in order:
            receive = input_of(stage, stages, chunks, compute)
            send = output_of(stage, stages, chunks, floor, compute)
            actions += [action for action in (receive, compute, send) if action is not None]
        naive.append(actions)
    placed: list[list[tuple[tuple, Action]]] = [[] for _ in orders]
    for event in simulate(naive, seconds).events:
        action = event.action
        when: tuple  # sort key: at equal start a message goes before a compute
        if action.op in SENDS:
            when = (event.start, 0, event.stage, action.op, action.chunk, action.microbatch)
            other, receive = other_end(event.stage, stages, action)
            placed[other].append((when, receive))
        else:
            when = (event.start, 1)
        placed[event.stage].append((when, action))
    return tuple(tuple(action for _, action in sorted(actions, key=lambda pair: pair[0])) for actions in placed)


def count_peak(actions: Sequence[Action]) -> Peak:
    """Return what a stage that runs `actions` keeps at most."""
    forwards_only = {(a.microbatch, a.chunk) for a in actions if a.op == FORWARD}
    forwards_only -= {(a.microbatch, a.chunk) for a in actions if a.op == BACKWARD}
    recomputed = {(a.microbatch, a.chunk) for a in actions if a.op == RECOMPUTE}
    activations = inputs = most_activations = most_inputs = 0
    for action in actions:
        key = (action.microbatch, action.chunk)
        if action.op not in COMPUTE or key in forwards_only:
            continue
        graph = action.op == (RECOMPUTE if key in recomputed else FORWARD)
        activations += graph - (action.op == BACKWARD)
        inputs += (key in recomputed) * ((action.op == FORWARD) - (action.op == BACKWARD))
        most_activations, most_inputs = max(most_activations, activations), max(most_inputs, inputs)
    return Peak(most_activations, most_inputs)


# ---- the orders ----


def gpipe(stage: int, stages: int, microbatches: int, chunks: int) -> list[Action]:
    """Return all forwards, then all backwards, both in the order of the microbatches (Huang et al. 2019)."""
    return [Action(op, m) for op in (FORWARD, BACKWARD) for m in range(microbatches)]


def _one_f_one_b(microbatches: int, ahead: int, recompute: bool = False) -> list[Action]:
    """Return `ahead` forwards, then a forward and a backward in turn, then the backwards that are left.

    A recompute stands before its backward: it needs no gradient, so it runs while that is under way.
    """
    ahead = min(ahead, microbatches)
    actions = [Action(FORWARD, m) for m in range(ahead)]
    for m in range(microbatches):
        if m + ahead < microbatches:
            actions.append(Action(FORWARD, m + ahead))
        if recompute:
            actions.append(Action(RECOMPUTE, m))
        actions.append(Action(BACKWARD, m))
    return actions


def _interleaved(stage: int, stages: int, microbatches: int, chunks: int) -> list[Action]:
    """Return interleaved 1F1B (Narayanan et al. 2021): microbatches in groups of p go through chunk after chunk.

    A number that p does not divide is rounded up, and what the missing microbatches would do is left out: what is
    left of an order that cannot stand still cannot either.
    """
    groups = -(-microbatches // stages)
    forwards, backwards = (
        [Action(op, group * stages + m, chunk) for group in range(groups) for chunk in order for m in range(stages)]
        for op, order in ((FORWARD, range(chunks)), (BACKWARD, range(chunks)[::-1]))
    )
    ahead = min(2 * (stages - stage - 1) + (chunks - 1) * stages, len(forwards))
    actions = forwards[:ahead]
    for i, backward in enumerate(backwards):
        actions += [*forwards[ahead + i : ahead + i + 1], backward]
    return [action for action in actions if action.microbatch < microbatches]


def _interleaved_in_flight(stage: int, stages: int, microbatches: int, chunks: int, trained: int) -> int:
    """Count what is kept before the first backward of the first group: the forwards of its trained chunks but the last,
    then those of 2 (p - s) - 1 more microbatches: of the last chunk, and after it of the next group's first, if that is
    trained.
    """
    group = min(stages, microbatches)
    more = 2 * (stages - stage) - 1
    next_group = min(max(0, more - stages), microbatches - group) if trained == chunks else 0
    return (trained - 1) * group + min(more, group) + next_group


def _ahead(stage: int, stages: int) -> int:
    return stages - stage - 1


def _eager_ahead(stage: int, stages: int) -> int:
    return 2 * (stages - stage - 1)


def _shifted(stage: int, stages: int, microbatches: int, chunks: int) -> list[Action]:
    """Return 1F1B with recompute but on the last stage; the one before it runs its third forward before its first
    backward.
    """
    actions = _one_f_one_b(microbatches, _ahead(stage, stages), _all_but_last(stage, stages))
    third = Action(FORWARD, 2)
    if stage == stages - 2 and third in actions:
        actions.remove(third)
        actions.insert(actions.index(Action(RECOMPUTE, 0)), third)
    return actions


def _from_ahead(
    name: str, ahead: Callable[[int, int], int], recomputes: Callable[[int, int], bool] = lambda stage, stages: False
) -> Schedule:
    """Return a kind of 1F1B, by how many forwards a stage runs before it begins to take turns."""
    return Schedule(
        name,
        lambda stage, stages, m, chunks: _one_f_one_b(m, ahead(stage, stages), recomputes(stage, stages)),
        lambda stage, stages, m, chunks, trained: min(ahead(stage, stages) + 1, m),
        recomputes,
    )


def _all_but_last(stage: int, stages: int) -> bool:
    return stage < stages - 1


SCHEDULES: Mapping[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule("gpipe", gpipe, lambda stage, stages, m, chunks, trained: m),
        # Narayanan et al. 2019 (PipeDream-Flush): stage s keeps min(p - s, m).
        _from_ahead("1f1b", _ahead),
        Schedule("interleaved_1f1b", _interleaved, _interleaved_in_flight, chunked=True),
        # Zhuang et al. 2022 (eager-1F1B): twice as many forwards ahead, so that a message each way is hidden.
        _from_ahead("eager_1f1b", _eager_ahead),
        # Merak (Lai et al. 2022): every stage recomputes whole, in the wait for the gradient.
        _from_ahead("pre_recompute_1f1b", _ahead, lambda stage, stages: True),
        # Merak: the last stage, whose backward follows at once, has nothing to gain from recomputing.
        _from_ahead("last_no_recompute_1f1b", _ahead, _all_but_last),
        # Merak: the critical path then goes through the stage before the last. It waits once, for its first gradient
        # (the last stage has the head and the loss to do): there it runs one forward more.
        Schedule(
            "shifted_critical_path",
            _shifted,
            lambda stage, stages, m, chunks, trained: min(_ahead(stage, stages) + 1 + (stage == stages - 2), m),
            _all_but_last,
        ),
    )
}


def _forwards(stage: int, stages: int, microbatches: int, chunks: int) -> list[Action]:
    return [action for action in _interleaved(stage, stages, microbatches, chunks) if action.op == FORWARD]


FORWARD_ONLY = Schedule("forward_only", _forwards, lambda *shape: 0, chunked=True)


def forward_only(stages: int, microbatches: int, chunks: int = 1) -> Programme:
    """Return every forward, nothing else (evaluation)."""
    return FORWARD_ONLY.programme(stages, microbatches, stages * chunks, chunks)
