"""The order of experts' rows by our kernels against a stable sort, and what moves and weighs the rows against torch: in
Triton's interpreter on a CPU, and on a GPU.
"""

from __future__ import annotations

import sys

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from megalora.ops import routing, weighted_gate

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
    check_rows(found, device)
    check_gate(found, device)


def check_rows(routes, device: str) -> None:
    """Each row is its token's, and each token the sum of its own rows; other ranks' rows are not read."""
    g = torch.Generator().manual_seed(1)
    wide = torch.randn(routes.tokens, 1040, generator=g).to(device)
    x, count = wide[:, :1030], int(routes.count)  # more than a block of 1024, and rows apart
    assert routing.fuses(x)
    rows = routing.dispatch(x, routes, 1030, 6)
    assert rows.shape == (len(routes.pair), 1036)
    assert torch.equal(rows[:count, :1030], x[routes.token[:count]])
    rows[count:] = float("nan")
    goal = torch.zeros(routes.tokens, 1036, device=device, dtype=torch.float64)
    goal.index_add_(0, routes.token[:count], rows[:count].double())
    torch.testing.assert_close(routing.combine(rows, routes).double(), goal, rtol=1e-5, atol=1e-5)


def check_gate(routes, device: str) -> None:
    """The gate's kernels against its plain torch, and what backward makes again against what forward made."""
    g = torch.Generator().manual_seed(2)
    gate_up = torch.randn(len(routes.pair), 2 * 40, generator=g).to(device)
    dh, weights = (
        torch.randn(*shape, generator=g).to(device) for shape in ((len(gate_up), 40), routes.places[0].shape)
    )
    count, gate = int(routes.count), weighted_gate.SILU
    X = gate.forward(gate_up, weights, routes, 0)
    once, again = (gate.backward(dh.clone(), gate_up, weights, routes, way) for way in (False, True))
    assert once.result is None and torch.equal(again.result[:count], X[:count])
    assert torch.equal(again.gate_up[:count], once.gate_up[:count])
    assert torch.equal(again.weights[:count], once.weights[:count])
    fuses, weighted_gate.fuses = weighted_gate.fuses, lambda rows: False
    plain = gate.backward(dh.clone(), gate_up, weights, routes, True)
    weighted_gate.fuses = fuses
    for ours, torchs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours[:count], torchs[:count], rtol=1e-4, atol=1e-5)


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
    routing.fuses = weighted_gate.fuses = lambda rows: True
    check(CASES[sys.argv[1]], "cpu")
