"""Which layers stand on which stage: all of them, in order, on each stage some; `parameters` against all other cuts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalora.errors import UserError
from megalora.pipeline.partition import partition

CUTS = st.integers(1, 12).flatmap(
    lambda stages: st.tuples(
        st.just(stages),
        st.lists(st.integers(0, 50), min_size=stages, max_size=40),
        st.integers(0, 99),
        st.integers(0, 99),
    )
)


@pytest.mark.parametrize("method", ["uniform", "uniform_floor", "parameters", "cost"])
@given(case=CUTS)
def test_every_layer_is_on_one_stage_in_order_and_no_stage_is_empty(method, case):
    stages, costs, first_cost, last_cost = case
    parts = partition(method, costs, stages, first_cost=first_cost, last_cost=last_cost)
    assert len(parts) == stages and all(parts)
    assert [layer for part in parts for layer in part] == list(range(len(costs)))
    sizes = [len(part) for part in parts]
    if method not in ("parameters", "cost"):
        assert max(sizes) - min(sizes) <= 1
    if method == "uniform_floor" and len(costs) % stages <= max(0, stages - 2):
        assert sizes[0] == sizes[-1] == len(costs) // stages, "the remainder goes to the stages between"


SECONDS = st.floats(0, 40, allow_subnormal=False)


@pytest.mark.parametrize("method, number", [("parameters", st.integers(0, 40)), ("cost", SECONDS)])
@given(data=st.data(), stages=st.integers(1, 5))
def test_the_dearest_stage_is_as_cheap_as_any_cut_can_make_it(method, number, data, stages):
    costs = data.draw(st.lists(number, min_size=5, max_size=9))
    first_cost, last_cost = data.draw(number), data.draw(number)

    def dearest(bounds: tuple[int, ...]) -> int:
        totals = [sum(costs[a:b]) for a, b in itertools.pairwise((0, *bounds, len(costs)))]
        totals[0] += first_cost
        totals[-1] += last_cost
        return max(totals)

    best = min(map(dearest, itertools.combinations(range(1, len(costs)), stages - 1)))
    parts = partition(method, costs, stages, first_cost=first_cost, last_cost=last_cost)
    assert dearest(tuple(part.start for part in parts[1:])) == pytest.approx(best)


def test_a_heavy_head_takes_layers_off_the_last_stage():
    sizes = [len(part) for part in partition("parameters", [10] * 8, 4, first_cost=0, last_cost=20)]
    assert sizes[-1] == 1 and max(sizes) == 3


@pytest.mark.parametrize(
    "method, layers, stages, sizes",
    [
        ("uniform", 30, 4, [7, 8, 7, 8]),
        ("uniform_floor", 30, 4, [7, 8, 8, 7]),
        ("uniform_floor", 31, 4, [8, 8, 8, 7]),
        ("uniform_floor", 3, 2, [2, 1]),
        ("uniform", 28, 4, [7] * 4),
        ("uniform_floor", 28, 1, [28]),
    ],
)
def test_known_cuts(method, layers, stages, sizes):
    assert [len(part) for part in partition(method, [1] * layers, stages)] == sizes


def test_custom():
    assert partition("custom", [1] * 6, 3, custom=[1, 3, 2]) == [range(0, 1), range(1, 4), range(4, 6)]


@pytest.mark.parametrize("custom", [None, [], [6], [1, 2, 2], [2, 4, 1], [0, 3, 3], [-1, 3, 4], [2, 2, 1, 1]])
def test_custom_must_add_up(custom):
    with pytest.raises(UserError, match=r"custom_partition .* 3 positive numbers .* num_hidden_layers \(6\)"):
        partition("custom", [1] * 6, 3, custom=custom)


@pytest.mark.parametrize("method", ["uniform", "uniform_floor", "parameters", "custom"])
def test_more_stages_than_layers(method):
    with pytest.raises(UserError, match=r"pipeline_parallel_size \(4\) is more than num_hidden_layers \(3\).* most 3"):
        partition(method, [1] * 3, 4)


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match="partition_method = 'type:layer' is unknown: choose among uniform, "):
        partition("type:layer", [1] * 4, 2)
