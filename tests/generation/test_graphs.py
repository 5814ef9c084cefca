"""Decoding by graphs, with a recorder that does the work again, without a GPU. On a GPU: test_steps.py."""

from __future__ import annotations

import torch
from generating import WithoutGpu

from megalora.generation.graphs import WARM_UP, DecodeGraphs

SPARE, HIDDEN = 9, 4


def decode(hidden, ids, slots, places, adapters):
    """Depends on all that it is given, row by row."""
    rows = torch.stack([ids, slots, places, adapters], 1).double()
    return rows if hidden is None else rows + hidden


def with_recorder(like):
    graphs = DecodeGraphs(decode, SPARE, torch.device("cpu"), like)
    graphs._recorder = WithoutGpu()
    return graphs


def test_a_step_is_recorded_once_for_each_power_of_two_and_reads_its_tokens_anew():
    for like in (None, torch.zeros(HIDDEN, dtype=torch.float64)):
        graphs = with_recorder(like)
        for count in (1, 3, 4, 2, 3, 5, 1):
            ids, slots, places, owners = ([base + i for i in range(count)] for base in (10, 0, 50 + count, 2))
            hidden = None if like is None else torch.rand(count, HIDDEN, dtype=torch.float64)
            wanted = decode(hidden, *map(torch.tensor, (ids, slots, places, owners)))
            assert graphs(hidden, ids, slots, places, owners).equal(wanted), count
        assert graphs._recorder.warm_ups == [WARM_UP] * 4, "for 1, 4, 2 and 8"


def test_what_a_step_has_less_goes_to_the_spare_slot():
    seen = []

    def noted(hidden, ids, slots, places, adapters):
        seen.append(slots.tolist())
        return decode(hidden, ids, slots, places, adapters)

    graphs = with_recorder(None)
    graphs._decode = noted
    graphs(None, [1, 2, 3], [0, 1, 2], [7, 7, 7], [0, 0, 0])
    assert seen == [[SPARE] * 4, [0, 1, 2, SPARE]]


def test_what_was_recorded_can_be_given_up_and_is_recorded_anew():
    graphs, factor = with_recorder(None), 1.0
    graphs._decode = lambda hidden, *where: decode(hidden, *where) * factor
    for factor in (1.0, 2.0):  # noqa: B007  read by what is recorded
        graphs(None, [1], [0], [7], [0])
        graphs.forget()
    assert len(graphs._recorder.forgotten) == 2 and len(graphs._recorder.warm_ups) == 2
    graphs.forget()
    assert len(graphs._recorder.forgotten) == 2
