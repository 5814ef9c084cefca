"""Every schedule, for up to 8 stages, 16 microbatches and every floor, run by a machine that moves tokens, not tensors.

The machine knows two kinds of sending: `buffered` (gloo: a send ends at once) and `rendezvous` (NCCL at its
strictest: a group of communications that were posted together ends only when each has met its other end, and until
then the stage stands still). A schedule that needs a buffer, or has sends and receives cross, stands still for ever.
"""

import itertools
from collections import deque

import pytest

from megalora.pipeline.runner import _communication_together
from megalora.pipeline.schedule import (
    BACKWARD,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    SCHEDULES,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    forward_only,
    peak_in_flight,
)

STAGES = range(1, 9)
MICROBATCHES = range(1, 17)
DOWNSTREAM = {SEND_FORWARD: True, RECV_BACKWARD: True, RECV_FORWARD: False, SEND_BACKWARD: False}
SENDS = {SEND_FORWARD: RECV_FORWARD, SEND_BACKWARD: RECV_BACKWARD}


class StandsStill(AssertionError):
    pass


def simulate(lists: list[list[Action]], rendezvous: bool) -> None:
    """Runs the action list of every stage; raises StandsStill, or AssertionError where a wrong thing arrives.

    Communications between two stages meet in the order in which they are posted, as they do in a process group.
    """
    stages = len(lists)
    groups = [deque(list(group) for group in _communication_together(actions)) for actions in lists]
    posted: dict[tuple[int, int], deque] = {}  # (from, to): sends that no receive has met yet
    wanted: dict[tuple[int, int], deque] = {}  # (from, to): receives that no send has met yet
    open_: list[set[Action]] = [set() for _ in lists]  # of the group under way: what it still waits for
    under_way = [False] * stages
    has: list[set[tuple[str, int]]] = [set() for _ in lists]  # what a stage has received or computed

    def peer(stage: int, action: Action) -> int:
        other = stage + (1 if DOWNSTREAM[action.op] else -1)
        assert 0 <= other < stages, f"stage {stage} has no neighbour for {action}"
        return other

    def meet(channel: tuple[int, int]) -> None:
        while posted.get(channel) and wanted.get(channel):
            sent, received = posted[channel].popleft(), wanted[channel].popleft()
            assert SENDS[sent.op] == received.op and sent.microbatch == received.microbatch, (sent, received)
            open_[channel[0]].discard(sent)
            open_[channel[1]].discard(received)
            has[channel[1]].add((received.op, received.microbatch))

    def start(stage: int, group: list[Action]) -> None:
        for action in group:
            m = action.microbatch
            if action.op == SEND_FORWARD:
                assert (FORWARD, m) in has[stage], f"stage {stage} sends forward {m} before it has it"
            if action.op == SEND_BACKWARD:
                assert (BACKWARD, m) in has[stage], f"stage {stage} sends backward {m} before it has it"
            sends = action.op in SENDS
            channel = (stage, peer(stage, action)) if sends else (peer(stage, action), stage)
            (posted if sends else wanted).setdefault(channel, deque()).append(action)
            if rendezvous or not sends:
                open_[stage].add(action)
            meet(channel)

    def compute(stage: int, action: Action) -> None:
        m = action.microbatch
        if action.op == FORWARD:
            assert stage == 0 or (RECV_FORWARD, m) in has[stage], f"stage {stage}: forward {m} has no input"
        else:
            assert (FORWARD, m) in has[stage], f"stage {stage}: backward {m} before forward"
            last = stage == stages - 1
            assert last or (RECV_BACKWARD, m) in has[stage], f"stage {stage}: backward {m} has no gradient"
        assert (action.op, m) not in has[stage], f"stage {stage} does {action} twice"
        has[stage].add((action.op, m))

    while any(groups):
        moved = False
        for stage in range(stages):
            while groups[stage]:
                group = groups[stage][0]
                if group[0].op in (FORWARD, BACKWARD):
                    compute(stage, group[0])
                else:
                    if not under_way[stage]:
                        start(stage, group)
                        under_way[stage] = moved = True
                    if open_[stage]:
                        break
                    under_way[stage] = False
                groups[stage].popleft()
                moved = True
        if not moved:
            raise StandsStill([group[0] for group in groups if group])
    assert not any(posted.values()) and not any(wanted.values()), "something sent was never received"


@pytest.mark.parametrize("rendezvous", [False, True], ids=["buffered", "rendezvous"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", STAGES)
def test_no_stage_waits_for_ever_and_everything_arrives_once(stages, name, rendezvous):
    for microbatches in MICROBATCHES:
        for floor in range(stages):
            lists = [SCHEDULES[name](s, stages, microbatches, floor=floor) for s in range(stages)]
            simulate(lists, rendezvous)
            for stage, actions in enumerate(lists):
                for op, expected in ((FORWARD, True), (BACKWARD, stage >= floor)):
                    done = sorted(a.microbatch for a in actions if a.op == op)
                    assert done == (list(range(microbatches)) if expected else [])
                backwards = {a.op for a in actions} & {BACKWARD, SEND_BACKWARD}
                assert SEND_BACKWARD not in backwards or stage > floor


@pytest.mark.parametrize("rendezvous", [False, True], ids=["buffered", "rendezvous"])
def test_forward_only(rendezvous):
    for stages, microbatches in itertools.product(STAGES, MICROBATCHES):
        lists = [forward_only(s, stages, microbatches) for s in range(stages)]
        simulate(lists, rendezvous)
        for actions in lists:
            assert [a.microbatch for a in actions if a.op == FORWARD] == list(range(microbatches))
            assert not {BACKWARD, SEND_BACKWARD, RECV_BACKWARD} & {a.op for a in actions}


@pytest.mark.parametrize("stages", STAGES)
def test_microbatches_in_flight(stages):
    for microbatches, floor in itertools.product(MICROBATCHES, range(stages)):
        for stage in range(floor, stages):
            one = SCHEDULES["1f1b"](stage, stages, microbatches, floor=floor)
            assert peak_in_flight(one) == min(stages - stage, microbatches)
            assert peak_in_flight(SCHEDULES["gpipe"](stage, stages, microbatches, floor=floor)) == microbatches


def test_backwards_run_in_one_order_on_all_schedules():
    """Gradients are then added up in one order, so that a schedule changes no bit."""
    for name, stages in itertools.product(SCHEDULES, STAGES):
        for stage in range(stages):
            order = [a.microbatch for a in SCHEDULES[name](stage, stages, 9) if a.op == BACKWARD]
            assert order == list(range(9)), name


def test_a_stage_below_the_floor_has_only_forwards():
    ops = {a.op for a in SCHEDULES["1f1b"](1, 4, 6, floor=2)}
    assert ops == {RECV_FORWARD, FORWARD, SEND_FORWARD}
    assert SEND_BACKWARD not in {a.op for a in SCHEDULES["1f1b"](2, 4, 6, floor=2)}


# ---- the machine itself


SHORT = {"F": FORWARD, "B": BACKWARD, "sf": SEND_FORWARD, "sb": SEND_BACKWARD, "rf": RECV_FORWARD, "rb": RECV_BACKWARD}


def written(text: str) -> list[Action]:
    """ "F0 sf0" -> the actions forward 0, send_forward 0."""
    return [Action(SHORT[word[:-1]], int(word[-1])) for word in text.split()]


def test_the_machine_finds_what_needs_a_buffer():
    """Stage 0 sends 2 while stage 1 sends the gradient of 0, and neither receives before its send has ended."""
    lists = [
        written("F0 sf0 F1 sf1 F2 sf2 F3 rb0 B0 rb1 B1 rb2 B2"),
        written("rf0 F0 rf1 F1 B0 sb0 B1 rf2 F2 B2 sb1 sb2"),
    ]
    simulate(lists, rendezvous=False)
    with pytest.raises(StandsStill):
        simulate(lists, rendezvous=True)


@pytest.mark.parametrize(
    "above, below, what",
    [
        ("F0 sf0 rb0 B0", "rf0 F0", StandsStill),  # a gradient that never comes
        ("F0 sf0 F1 sf1", "rf1 F1 rf0 F0", AssertionError),  # another microbatch
        ("F0 sf0 F1 sf1", "rf0 F0", AssertionError),  # sent to nobody
        ("sf0 F0", "rf0 F0", AssertionError),  # sent before it is there
        ("F0 sf0", "F0 rf0", AssertionError),  # computed before it is there
        ("F0 sf0 F0", "rf0 F0", AssertionError),  # twice
        ("F0 sf0 B0", "rf0 F0 B0", AssertionError),  # backward without a gradient
        ("F0 sf0", "rf0 F0 sf0", AssertionError),  # past the last stage
    ],
)
@pytest.mark.parametrize("rendezvous", [False, True])
def test_the_machine_finds_mistakes(above, below, what, rendezvous):
    with pytest.raises(what):
        simulate([written(above), written(below)], rendezvous)
