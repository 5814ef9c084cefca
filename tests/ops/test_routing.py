"""The order of experts' rows by our kernels against a stable sort: in Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from megalora.ops import routing

# tokens, choices, experts, the rank's first and the one behind its last, programs that count
CASES = {
    "all": (100, 8, 128, 0, 128, 128),
    "of a rank": (37, 3, 8, 2, 6, 128),
    "one expert": (5, 1, 40, 39, 40, 128),
    "several blocks of a program": (300, 4, 600, 0, 600, 4),
    "none of this rank": (20, 2, 8, 7, 8, 3),
}
LARGE = (4096, 8, 128, 32, 96, 128)


def check(case, device: str) -> None:
    tokens, choices, experts, first, stop, routing._MOST_COUNTS = case
    g = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, experts, generator=g)
    if case == CASES["none of this rank"]:
        scores[:, first:] = -1
    chosen = scores.to(device).sort(-1, descending=True).indices[:, :choices]  # a view with gaps, as in a layer
    found, count = routing._ordered(chosen, first, stop), stop - first
    flat = chosen.flatten() - first
    local = torch.where((flat >= 0) & (flat < count), flat, count)
    expert, pair = local.sort(stable=True)
    bounds = torch.searchsorted(expert, torch.arange(count, device=device), right=True)
    place = torch.empty_like(pair)
    place[pair] = torch.arange(len(pair), device=device)
    own = (local < count).view_as(chosen)
    assert torch.equal(found.pair, pair) and torch.equal(found.expert, expert)
    assert torch.equal(found.bounds, bounds.int()) and found.bounds.dtype == torch.int32
    assert torch.equal(found.places[1], own)
    assert torch.equal(found.places[0], torch.where(own, place.view_as(chosen), 0))
    assert (found.tokens, found.choices) == (tokens, choices)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name):
    run_interpreted(__file__, name)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES.values(), LARGE], ids=[*CASES, "large"])
def test_on_a_gpu(case, monkeypatch):
    monkeypatch.setattr(routing, "_MOST_COUNTS", routing._MOST_COUNTS)  # restored afterwards
    check(case, "cuda")


if __name__ == "__main__":
    check(CASES[sys.argv[1]], "cpu")
