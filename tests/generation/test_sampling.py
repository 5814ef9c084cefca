"""The choice of a token: the distribution of transformers' warpers, and nothing else that it depends on."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megalora.generation.sampling import NOT_FINITE, Sampling, choose, draw


def logits(rows: int = 1, vocab_size: int = 12) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(5)) * 2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7),
        Sampling(1.5, top_k=1),
        Sampling(1.5, top_k=4),
        Sampling(1.3, top_k=99),
        Sampling(1.3, top_p=0.6),
        Sampling(0.9, top_p=1.0),
        Sampling(0.9, top_p=0.01),
        Sampling(2.0, top_k=6, top_p=0.8),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(sampling):
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits())
    if sampling.top_k is not None:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p is not None:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    count = 20000
    draws = [(i + 0.5) / count for i in range(count)]
    chosen = choose(logits().expand(count, -1), sampling, draws)
    found = chosen.bincount(minlength=12) / count
    expected = warped.softmax(-1)[0]
    assert ((found > 0) == (expected > 0)).all()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_greedy_takes_the_lowest_id_of_a_tie():
    tied = torch.zeros(2, 50, dtype=torch.bfloat16)
    tied[0, [7, 30, 49]] = 3.0
    assert choose(tied, Sampling(), []).tolist() == [7, 0]
    in_parts = torch.zeros(3, 128 * 7)  # of 64 parts of 14
    in_parts[0, [20, 27, 500]] = in_parts[1, [895]] = 2.0
    assert choose(in_parts, Sampling(), []).tolist() == [20, 895, 0]
    in_parts[2, 400] = torch.nan
    assert choose(in_parts, Sampling(), []).tolist() == [20, 895, NOT_FINITE]


def test_rows_do_not_touch_one_another():
    sampling, many = Sampling(1.0, top_k=8, top_p=0.9), logits(6)
    draws = [draw(1, row, 0) for row in range(6)]
    alone = [choose(many[row : row + 1], sampling, draws[row : row + 1]).item() for row in range(6)]
    assert choose(many, sampling, draws).tolist() == alone


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=3, top_p=0.5)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_told(sampling, value):
    broken = logits(3)
    broken[1, 4] = value
    chosen = choose(broken, sampling, [0.3, 0.3, 0.3]).tolist()
    assert chosen[1] == NOT_FINITE and NOT_FINITE not in (chosen[0], chosen[2])


@pytest.mark.parametrize("extreme", [0.5 / 2**48, 1 - 0.5 / 2**48])
def test_an_extreme_draw_stays_in_the_choice(extreme):
    least = torch.tensor([[-500.0, 1.0, 2.0, -500.0]])
    assert choose(least, Sampling(1.0, top_p=0.999), [extreme]).item() in (1, 2)


def test_draws_are_uniform_and_their_own():
    draws = {(s, p, t): draw(s, p, t) for s in range(8) for p in range(16) for t in range(32)}
    assert len(set(draws.values())) == len(draws)
    assert all(0 < value < 1 for value in draws.values())
    assert abs(sum(draws.values()) / len(draws) - 0.5) < 0.02
    assert draws[3, 4, 5] == draw(3, 4, 5)
