"""The GPU's own attention kernels against plain torch in float32, every kind of scores, forward and backward."""

from __future__ import annotations

import pytest
import torch

from megalora.ops.cross_attention import Crossing, cross_attention
from megalora.ops.dropout import Dropout
from megalora.ops.fused_attention import Documents, fused_attention, fuses
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.ops.tiled_attention import Scores, runs_of, tiled_attention

pytestmark = pytest.mark.gpu
EVEN, CUT = (0, 256, 512), (0, 37, 300, 301, 555)
CASES = {
    "softcap": (CUT, 8, 2, 256, 100, {"softcap": 20.0}, 0.0),
    "dropout": (CUT, 4, 4, 64, None, {}, 0.1),
    "dropout, both ways": (EVEN, 4, 4, 64, None, {"causal": False}, 0.3),
    "dropout, window": (CUT, 8, 2, 128, 50, {"scale": 0.3}, 0.1),
    "slopes, dropout": (EVEN, 4, 4, 128, None, {"slopes": True}, 0.2),
    "sinks": (CUT, 8, 1, 64, 40, {"sinks": True}, 0.0),
    "offsets": (CUT, 4, 4, 64, None, {"causal": False, "offsets": 20}, 0.1),
    "odd heads": (CUT, 4, 2, 80, None, {"softcap": 5.0}, 0.1),
    "everything": (CUT, 8, 2, 128, 70, {"softcap": 9.0, "slopes": True, "sinks": True, "offsets": 9}, 0.1),
}


@pytest.fixture(autouse=True)
def needs_triton():
    if not fuses(64, torch.bfloat16, torch.device("cuda")):
        pytest.skip("triton is not installed")


def draw(p: float, sites: int, live: bool, tokens: torch.Tensor, keys=None) -> ProbabilityDropout | None:
    if p == 0.0:
        return None
    step = torch.tensor(7, device="cuda") if live else 7
    numbers = torch.tensor([4_000_000_000 - i for i in range(sites)], device="cuda")
    return ProbabilityDropout(Dropout(p, (5 << 33) + 3_000_000_000, 0, step), numbers, tokens, keys)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


@pytest.mark.parametrize("waves", [0, 6], ids=["keys of all heads", "keys of each head"])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_as_in_plain_torch(name, live, waves, monkeypatch):
    monkeypatch.setattr("megalora.ops.fused_attention._FEWEST_WAVES", waves)
    bounds, heads, kv_heads, dim, window, kind, p = CASES[name]
    torch.manual_seed(0)
    total = bounds[-1]
    packed = random(total, (heads + 2 * kv_heads) * dim).unflatten(1, (-1, dim))
    parts = [x.detach().requires_grad_() for x in packed.split([heads, kv_heads, kv_heads], 1)]  # views, as in a layer
    kind = dict(kind)
    if kind.get("slopes"):
        kind["slopes"] = torch.rand(heads, device="cuda") * 0.1
    if kind.get("sinks"):
        kind["sinks"] = torch.randn(heads, device="cuda")
    if kind.get("offsets"):
        kind["offsets"] = torch.randn(heads, 2 * kind["offsets"] + 1, device="cuda")
    scores = Scores(**kind)
    drawn = draw(p, heads, live, torch.arange(total, device="cuda") + (1 << 33) + 13)
    dout = random(total, heads, dim)
    wide = [x.detach().float().requires_grad_() for x in parts]
    wanted = tiled_attention(*wide, runs_of(bounds), window, scores, drawn)
    gradients = torch.autograd.grad(wanted, wide, dout.float())
    if len(runs_of(bounds)) == 1:
        documents = Documents(len(bounds) - 1, bounds[1])
    else:  # empty documents behind the last, and a bound above the longest
        on_device = torch.tensor([*bounds, total, total], dtype=torch.int32, device="cuda")
        documents = Documents(len(bounds) + 1, 512, on_device)
    found = fused_attention(*parts, documents, window, scores, drawn)
    ours = torch.autograd.grad(found, parts, dout)
    assert apart(found, wanted) < 6e-3
    for one, other in zip(ours, gradients, strict=True):
        assert apart(one, other) < 1.2e-2
    again = fused_attention(*parts, documents, window, scores, drawn)
    assert torch.equal(again, found)
    assert all(map(torch.equal, torch.autograd.grad(again, parts, dout), ours))


def test_cross_attention_with_dropout():
    torch.manual_seed(0)
    bounds, key_bounds = (0, 40, 47, 160), (0, 13, 70, 70)
    q, k, v, dout = random(160, 4, 64), random(70, 4, 64), random(70, 4, 64), random(160, 4, 64)
    parts = [x.requires_grad_() for x in (q, k, v)]
    wide = [x.detach().float().requires_grad_() for x in parts]
    drawn = draw(0.2, 4, False, torch.arange(160, device="cuda") + 100, torch.arange(70, device="cuda") + 3)
    wanted = cross_attention(*wide, Crossing(bounds, key_bounds), 0.2, drawn)
    crossing = Crossing.of(bounds, key_bounds, 64, torch.bfloat16, torch.device("cuda"))
    found = cross_attention(*parts, crossing, 0.2, drawn)
    assert apart(found, wanted) < 6e-3 and not found[47:].any()
    pairs = zip(
        torch.autograd.grad(found, parts, dout), torch.autograd.grad(wanted, wide, dout.float()), strict=True
    )
    assert all(apart(ours, theirs) < 1.2e-2 for ours, theirs in pairs)
