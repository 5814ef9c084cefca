"""The machine proof: every schedule for up to 16 stages, 4 chunks and 64 microbatches, run by the simulator.

It raises where an action comes before what it needs, twice or to nobody, and where stages stand still: with sends that
are handed over (gloo), and with sends that last until their receive has begun (NCCL at its strictest). `make proof`
runs every size; the suite up to 8 stages, 11 and 16, with those numbers of microbatches that are special.
"""

import itertools
import os
from collections import Counter

import pytest

from megalora.pipeline.actions import (
    BACKWARD,
    COMPUTE,
    FORWARD,
    RECOMPUTE,
    RECV_BACKWARD,
    SEND_BACKWARD,
    Action,
    part_of,
)
from megalora.pipeline.schedule import FORWARD_ONLY, SCHEDULES, Peak, Schedule, count_peak, forward_only
from megalora.pipeline.simulate import simulate

EVERY_SIZE = os.environ.get("MEGALORA_PROOF") == "all"
STAGES = range(1, 17) if EVERY_SIZE else (*range(1, 9), 11, 16)
MICROBATCHES = range(1, 65)


def seconds(stage: int, action: Action) -> float:
    return 1.0 if action.op in COMPUTE else 0.0


def chunk_counts(schedule: Schedule, stages: int) -> range:
    return range(1, 5 if schedule.chunked and stages > 1 else 2)


def prove(schedule: Schedule, stages: int, microbatches: int, floor: int, chunks: int) -> None:
    programme = Schedule.programme.__wrapped__(schedule, stages, microbatches, floor, chunks)  # not cached
    simulate(programme, seconds, buffered=True)
    simulate(programme, seconds, buffered=False)
    for stage, actions in enumerate(programme):
        case = (schedule.name, stages, microbatches, floor, chunks, stage)
        done = Counter((action.op, action.chunk) for action in actions)
        for chunk in range(chunks):
            part = part_of(stage, stages, chunk)
            trained = part >= floor and schedule is not FORWARD_ONLY
            assert done[FORWARD, chunk] == microbatches, case
            assert done[BACKWARD, chunk] == (microbatches if trained else 0), case
            assert done[RECOMPUTE, chunk] == (microbatches if trained and schedule.recomputes(stage, stages) else 0)
            assert done[SEND_BACKWARD, chunk] == (microbatches if trained and part > floor else 0), case
            assert done[RECV_BACKWARD, chunk] == (microbatches if trained and part < stages * chunks - 1 else 0), case
        assert count_peak(actions) == schedule.peak(stage, stages, microbatches, floor, chunks), case
        for chunk in range(chunks):  # gradients add up in one order, so that a schedule changes no bit
            order = [action.microbatch for action in actions if action.op == BACKWARD and action.chunk == chunk]
            assert order == sorted(order), case


def special(stages: int) -> list[int]:
    """One microbatch, one fewer than stages, one more than two rounds of them, and another."""
    numbers = {1, stages - 1, 2 * stages + 1, 37 * stages % 64 + 1}
    return sorted(m for m in numbers if m in MICROBATCHES)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", [*SCHEDULES, FORWARD_ONLY.name])
def test_no_stage_stands_still_and_each_keeps_what_the_formula_says(name, stages):
    schedule = (SCHEDULES | {FORWARD_ONLY.name: FORWARD_ONLY})[name]
    for chunks in chunk_counts(schedule, stages):
        parts = stages * chunks
        for turn, microbatches in enumerate(MICROBATCHES if EVERY_SIZE else special(stages)):
            floors = {parts} if schedule is FORWARD_ONLY else {0}
            if parts <= 8 and schedule is not FORWARD_ONLY:
                floors.add((turn + 1) * (stages + chunks) % parts)
            for floor in floors:
                prove(schedule, stages, microbatches, floor, chunks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_floor(name):
    schedule = SCHEDULES[name]
    for stages, microbatches in itertools.product((1, 2, 3, 5), (1, 2, 4, 7)):
        for chunks in chunk_counts(schedule, stages):
            for floor in range(stages * chunks):
                prove(schedule, stages, microbatches, floor, chunks)


def peaks(name: str, stages: int, microbatches: int, chunks: int = 1) -> list[Peak]:
    return [SCHEDULES[name].peak(stage, stages, microbatches, 0, chunks) for stage in range(stages)]


def test_formulas_that_are_known():
    assert peaks("1f1b", 4, 8) == [Peak(4), Peak(3), Peak(2), Peak(1)]
    assert peaks("1f1b", 4, 2) == [Peak(2), Peak(2), Peak(2), Peak(1)]
    assert peaks("gpipe", 4, 8) == [Peak(8)] * 4
    assert peaks("eager_1f1b", 4, 8) == [Peak(7), Peak(5), Peak(3), Peak(1)]
    assert peaks("interleaved_1f1b", 4, 8, 2) == [Peak(11), Peak(9), Peak(7), Peak(5)]
    assert peaks("pre_recompute_1f1b", 4, 8) == [Peak(1, 4), Peak(1, 3), Peak(1, 2), Peak(1, 1)]
    assert peaks("last_no_recompute_1f1b", 4, 8) == [Peak(1, 4), Peak(1, 3), Peak(1, 2), Peak(1)]
    assert peaks("shifted_critical_path", 4, 8) == [Peak(1, 4), Peak(1, 3), Peak(1, 3), Peak(1)]


def makespan(name: str, stages: int, microbatches: int, chunks: int = 1, backward: float = 1.0, **options) -> float:
    times = {FORWARD: 1.0 / chunks, RECOMPUTE: 1.0 / chunks, BACKWARD: backward / chunks}
    programme = SCHEDULES[name].programme(stages, microbatches, 0, chunks)
    return simulate(programme, lambda stage, action: times.get(action.op, 0.0), **options).makespan


def test_what_each_schedule_is_for():
    p, m = 4, 8
    assert makespan("1f1b", p, m) == makespan("gpipe", p, m) == 2 * (m + p - 1)
    for v in (2, 4):  # Narayanan et al. 2021: the bubble is divided by v
        assert makespan("interleaved_1f1b", p, m, v) == 2 * m + 2 * (p - 1) / v
    # Recomputing whole stages in the backward would take 3 (m + p - 1): the recompute is not on the way up ...
    assert makespan("pre_recompute_1f1b", p, m) == 3 * m + 2 * (p - 1)
    # ... nor is the last stage's at all,
    assert makespan("last_no_recompute_1f1b", p, m) == 3 * m + 2 * (p - 2)
    # and where its backward is long, the stage before it does not wait for it.
    slow = {name: makespan(name, p, m, backward=2.0) for name in ("last_no_recompute_1f1b", "shifted_critical_path")}
    assert slow["shifted_critical_path"] == slow["last_no_recompute_1f1b"] - 1
    late = {"latency": 0.1}
    assert makespan("eager_1f1b", p, 16, **late) - makespan("eager_1f1b", p, 16) < 1
    assert makespan("1f1b", p, 16, **late) - makespan("1f1b", p, 16) > 2


def test_how_much_the_stages_wait():
    even = SCHEDULES["1f1b"].waiting(4, 8, 0, [0.25] * 4)
    assert even == pytest.approx(3 / 11) and SCHEDULES["1f1b"].waiting(1, 8, 0, [1.0]) == pytest.approx(0)
    assert SCHEDULES["interleaved_1f1b"].waiting(4, 8, 0, [0.125] * 8) == pytest.approx(1.5 / 9.5)
    assert SCHEDULES["1f1b"].waiting(4, 8, 0, [0.1, 0.3, 0.3, 0.3]) > even, "one stage has less to do"
    assert SCHEDULES["1f1b"].waiting(4, 8, 2, [0.25] * 4) == pytest.approx(even), "the same work, all of it forward"


def test_a_stage_below_the_floor_does_not_run_ahead():
    """It has no backward to wait for: what it sent, and nobody has read yet, would fill memory."""
    for name in ("1f1b", "interleaved_1f1b", "last_no_recompute_1f1b"):
        chunks = 2 if name == "interleaved_1f1b" else 1
        for stage, actions in enumerate(SCHEDULES[name].programme(4, 32, 2 * chunks, chunks)):
            unread = peak = 0
            for action in actions:
                unread += {"recv_forward": 1, FORWARD: -1}.get(action.op, 0) if stage else 0
                peak = max(peak, unread)
            assert peak <= 4 * chunks, (name, stage, peak)


def test_evaluation_has_forwards_alone():
    for actions in forward_only(3, 5, 2):
        assert {action.op for action in actions} <= {FORWARD, "send_forward", "recv_forward"}
        assert sorted(a.microbatch for a in actions if a.op == FORWARD and a.chunk == 1) == list(range(5))
