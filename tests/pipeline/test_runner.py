"""The runner on one process, with a stage that notes what is asked of it; layouts are in tests/test_layouts.py."""

import itertools

import pytest
import torch

from megalora.parallel.mesh import ParallelMesh
from megalora.pipeline.actions import COMPUTE, RECEIVES, SENDS, input_of, other_end
from megalora.pipeline.p2p import AHEAD, Neighbours
from megalora.pipeline.runner import PipelineRunner, receives_early
from megalora.pipeline.schedule import SCHEDULES, forward_only


class Noting:
    """loss = sum(weight * inputs), and a note of each call: whether it keeps a graph."""

    def __init__(self):
        self.weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        self.graphs: list[bool] = []

    def __call__(self, hidden, inputs, chunk=0):
        self.graphs.append(torch.is_grad_enabled())
        return (self.weight * inputs).sum()


def runner(stage: Noting, schedule: str, floor: int = 0) -> PipelineRunner:
    neighbours = Neighbours(ParallelMesh(), (1, 3), torch.float64, "cpu")
    return PipelineRunner(stage, neighbours, SCHEDULES[schedule], floor, device="cpu")


@pytest.mark.parametrize("schedule", [name for name, schedule in SCHEDULES.items() if not schedule.chunked])
def test_losses_and_gradients_add_up(schedule):
    stage = Noting()
    loss = runner(stage, schedule).train(4, lambda m: torch.full((3,), float(m)), 0.5)
    assert loss.item() == 3 * (0 + 1 + 2 + 3) and stage.weight.grad.tolist() == [3.0] * 3


def test_what_is_recomputed_keeps_no_graph_at_first():
    stage = Noting()
    runner(stage, "pre_recompute_1f1b").train(2, lambda m: torch.ones(3), 1.0)
    assert stage.graphs == [False, True] * 2
    stage.graphs.clear()
    runner(stage, "last_no_recompute_1f1b").train(2, lambda m: torch.ones(3), 1.0)
    assert stage.graphs == [True] * 2


def test_below_the_floor_and_in_evaluation_no_graph_is_built():
    stage = Noting()
    runner(stage, "1f1b", floor=1).train(3, lambda m: torch.ones(3), 1.0)
    runner(stage, "1f1b").evaluate(2, lambda m: torch.ones(3))
    assert stage.graphs == [False] * 5 and stage.weight.grad is None


@pytest.mark.parametrize("name", SCHEDULES)
def test_receives_are_posted_two_computes_early_and_in_order(name):
    chunks = 2 if SCHEDULES[name].chunked else 1
    for actions in SCHEDULES[name].programme(4, 6, 0, chunks):
        early = receives_early(actions, AHEAD)
        assert sorted(early) == sorted(actions)
        for ops in ({op} for op in RECEIVES | SENDS):
            assert [a for a in early if a.op in ops] == [a for a in actions if a.op in ops]
        assert [a for a in early if a.op in COMPUTE] == [a for a in actions if a.op in COMPUTE]
        before = {list_: {a: sum(b.op in COMPUTE for b in list_[:i]) for i, a in enumerate(list_)}
                  for list_ in (tuple(actions), tuple(early))}  # fmt: skip
        planned, posted = before[tuple(actions)], before[tuple(early)]
        for action in actions:
            if action.op in RECEIVES:
                assert posted[action] == max(0, planned[action] - 2)
            elif action.op in SENDS:
                assert posted[action] == planned[action]


@pytest.mark.parametrize("name", SCHEDULES)
def test_few_messages_are_posted_or_wait_to_be_read(name):
    """Each takes a buffer. Also where the stages below the floor have nothing to wait for."""
    chunks = 2 if SCHEDULES[name].chunked else 1
    for stages, floor in itertools.product((2, 4, 8), (0, 1)):
        programme = SCHEDULES[name].programme(stages, 4 * stages, floor * stages * chunks // 2, chunks)
        for stage, actions in enumerate(programme):
            buffers = most = 0
            for action in receives_early(actions, AHEAD):
                buffers += action.op in RECEIVES
                if action.op in COMPUTE and input_of(stage, stages, chunks, action) is not None:
                    buffers -= 1
                most = max(most, buffers)
            assert most <= 5, (stages, floor, stage)


def _stands_still(lists, buffered: bool) -> bool:
    """Whether stages wait for one another for ever where any compute waits for all that its stage has posted.

    buffered  a send has left once it is posted; else once its other end is
    """
    stages, done, posted = len(lists), [0] * len(lists), [set() for _ in lists]

    def has_come(stage, action):
        other, message = other_end(stage, stages, action)
        return message in posted[other] or (buffered and action.op in SENDS)

    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(lists):
            while done[stage] < len(actions):
                action = actions[done[stage]]
                if action.op not in COMPUTE:
                    posted[stage].add(action)
                elif not all(has_come(stage, waits) for waits in posted[stage]):
                    break
                done[stage] += 1
                moved = True
    return any(count < len(actions) for count, actions in zip(done, lists, strict=True))


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("name", [*SCHEDULES, "evaluation"])
def test_a_compute_may_wait_for_all_that_was_posted_where_receives_are_not_early(name, stages):
    """As on a GPU, where a waiting receive is a running kernel. Two computes early, a stage would wait for itself."""
    early_stands_still = False
    for count, chunks, floor in itertools.product((1, 2, 3, 4, 7, 12), (1, 2, 3), (0, 1)):
        if name != "evaluation" and (chunks > 1) != SCHEDULES[name].chunked:
            continue
        if name == "evaluation":
            programme = forward_only(stages, count, chunks)
        else:
            programme = SCHEDULES[name].programme(stages, count, floor * stages * chunks // 2, chunks)
        for buffered in (True, False):
            assert not _stands_still([receives_early(actions, 0) for actions in programme], buffered)
            early_stands_still |= _stands_still([receives_early(actions, AHEAD) for actions in programme], buffered)
    assert early_stands_still or name == "evaluation"
