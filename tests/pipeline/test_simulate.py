"""The simulator: known timelines by hand, and action lists with a mistake in them."""

import pytest

from megalora.pipeline.actions import (
    BACKWARD,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    SENDS,
    Action,
)
from megalora.pipeline.schedule import SCHEDULES
from megalora.pipeline.simulate import ScheduleError, StandsStill, simulate

SHORT = {"F": FORWARD, "B": BACKWARD, "sf": SEND_FORWARD, "sb": SEND_BACKWARD, "rf": RECV_FORWARD, "rb": RECV_BACKWARD}


def written(text: str) -> list[Action]:
    """ "F0 sf0" -> the actions forward 0, send_forward 0."""
    return [Action(SHORT[word[:-1]], int(word[-1])) for word in text.split()]


def seconds(stage: int, action: Action) -> float:
    return {FORWARD: 1.0, BACKWARD: 2.0}.get(action.op, 0.0)


def spans(timeline, stage: int) -> list[tuple[str, float, float]]:
    names = {op: name for name, op in SHORT.items()}
    return [(f"{names[e.action.op]}{e.action.microbatch}", e.start, e.end) for e in timeline.events if e.stage == stage]


def test_a_timeline_by_hand():
    lists = [written("F0 sf0 rb0 B0"), written("rf0 F0 B0 sb0")]
    timeline = simulate(lists, lambda s, a: 0.5 if a.op in SENDS else seconds(s, a), latency=0.25)
    assert spans(timeline, 0) == [("F0", 0, 1), ("sf0", 1, 1.75), ("B0", 5.5, 7.5)]
    assert spans(timeline, 1) == [("F0", 1.75, 2.75), ("B0", 2.75, 4.75), ("sb0", 4.75, 5.5)]
    assert timeline.makespan == 7.5 and timeline.busy == (3.0, 3.0) and timeline.bubble == 1 - 6 / 15


def test_a_line_carries_one_message_at_a_time():
    lists = [written("F0 sf0 F1 sf1"), written("rf0 F0 rf1 F1")]
    timeline = simulate(lists, lambda s, a: 3.0 if a.op in SENDS else 1.0)
    assert [(e.start, e.end) for e in timeline.events if e.action.op == SEND_FORWARD] == [(1, 4), (4, 7)]


def test_a_send_that_is_not_buffered_stops_its_stage():
    lists = [written("F0 sf0 F1 sf1"), written("rf0 F0 rf1 F1")]
    times = {0: 1.0, 1: 5.0}
    forwards = {
        buffered: [
            e.end for e in simulate(lists, lambda s, a: times[s] * (a.op == FORWARD), buffered=buffered).events
            if e.action.op == FORWARD and e.stage == 0
        ]
        for buffered in (True, False)
    }  # fmt: skip
    assert forwards == {True: [1, 2], False: [1, 2]}
    longer = [written("F0 sf0 F1 sf1 F2 sf2"), written("rf0 F0 rf1 F1 rf2 F2")]
    ends = [
        [e.end for e in simulate(longer, lambda s, a: times[s] * (a.op == FORWARD), buffered=b).events if not e.stage]
        for b in (True, False)
    ]
    assert max(ends[0]) == 3 and max(ends[1]) == 11


def test_the_pipelines_of_the_papers():
    for m in (1, 3, 8):
        timeline = simulate(SCHEDULES["1f1b"].programme(4, m), seconds)
        assert timeline.makespan == 3 * (m + 3) and timeline.busy == (3.0 * m,) * 4
        assert timeline.bubble == pytest.approx(3 / (m + 3))


def test_what_needs_a_buffer():
    """Stage 0 sends 2 while stage 1 sends the gradient of 0, and neither receives before its send has ended."""
    lists = [
        written("F0 sf0 F1 sf1 F2 sf2 F3 rb0 B0 rb1 B1 rb2 B2"),
        written("rf0 F0 rf1 F1 B0 sb0 B1 rf2 F2 B2 sb1 sb2"),
    ]
    simulate(lists, seconds)
    with pytest.raises(StandsStill):
        simulate(lists, seconds, buffered=False)


@pytest.mark.parametrize(
    "above, below, what",
    [
        ("F0 sf0 rb0 B0", "rf0 F0", StandsStill),  # a gradient that never comes
        ("F0 sf0 F1 sf1", "rf1 F1 rf0 F0", ScheduleError),  # another microbatch
        ("F0 sf0 F1 sf1", "rf0 F0", ScheduleError),  # sent to nobody
        ("sf0 F0", "rf0 F0", ScheduleError),  # sent before it is there
        ("F0 sf0", "F0 rf0", ScheduleError),  # computed before it is asked for
        ("F0 sf0 F0", "rf0 F0", ScheduleError),  # twice
        ("F0 sf0 B0", "rf0 F0 B0", ScheduleError),  # backward without a gradient
        ("F0 sf0 rb0 B0", "rf0 B0 sb0 F0", ScheduleError),  # backward before forward
        ("F0 sf0", "rf0 F0 sf0", ScheduleError),  # past the last stage
    ],
)
@pytest.mark.parametrize("buffered", [True, False])
def test_mistakes_are_found(above, below, what, buffered):
    with pytest.raises(what):
        simulate([written(above), written(below)], seconds, buffered=buffered)
