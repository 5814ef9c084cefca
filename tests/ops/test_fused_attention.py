"""The GPU's own attention kernels against plain torch, every kind of scores, forward and backward: on a GPU, and in
Triton's interpreter on a CPU.

Both need triton, which comes with torch for GPUs.
"""

from __future__ import annotations

import sys

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from megalora.ops import fused_attention as fused
from megalora.ops.cross_attention import Crossing, cross_attention
from megalora.ops.dropout import Dropout
from megalora.ops.fused_attention import Documents, fused_attention, fuses
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.ops.tiled_attention import Scores, runs_of, tiled_attention

pytestmark = needs_triton
EVEN, CUT = (0, 256, 512), (0, 37, 300, 301, 555)
CASES = {
    "softcap": (CUT, 8, 2, 256, 100, {"softcap": 20.0}, 0.0),
    "dropout": (CUT, 4, 4, 64, None, {}, 0.1),
    "large heads, offsets": (CUT, 4, 2, 256, None, {"causal": False, "offsets": 20}, 0.0),
    "large heads, dropout": (CUT, 4, 2, 256, None, {"softcap": 20.0}, 0.1),
    "dropout, both ways": (EVEN, 4, 4, 64, None, {"causal": False}, 0.3),
    "dropout, window": (CUT, 8, 2, 128, 50, {"scale": 0.3}, 0.1),
    "slopes, dropout": (EVEN, 4, 4, 128, None, {"slopes": True}, 0.2),
    "sinks": (CUT, 8, 1, 64, 40, {"sinks": True}, 0.0),
    "offsets": (CUT, 4, 4, 64, None, {"causal": False, "offsets": 20}, 0.1),
    "odd heads": (CUT, 4, 2, 80, None, {"softcap": 5.0}, 0.1),
    "everything": (CUT, 8, 2, 128, 70, {"softcap": 9.0, "slopes": True, "sinks": True, "offsets": 9}, 0.1),
}
SMALL = {
    "dropout": ((0, 37, 130, 131, 197), 4, 2, 16, None, {}, 0.3),
    "dropout, window": ((0, 100, 200), 2, 1, 32, 21, {"scale": 0.3}, 0.3),
    "dropout, both ways": ((0, 41, 130), 2, 2, 16, None, {"causal": False}, 0.3),
    "dropout, window both ways": ((0, 140), 2, 2, 16, 45, {"causal": False}, 0.3),
    "softcap": ((0, 37, 130), 4, 2, 16, None, {"softcap": 2.0}, 0.0),
    "softcap, window": ((0, 150), 2, 1, 16, 40, {"softcap": 2.0}, 0.0),
    "slopes, dropout": ((0, 64, 128), 2, 2, 16, None, {"slopes": True}, 0.2),
    "sinks": ((0, 37, 130), 4, 1, 16, 40, {"sinks": True}, 0.0),
    "offsets": ((0, 37, 130), 2, 2, 16, None, {"causal": False, "offsets": 20}, 0.1),
    "odd heads": ((0, 37, 130), 4, 2, 20, None, {"softcap": 5.0}, 0.1),
    "everything": ((0, 37, 130), 4, 2, 16, 30, {"softcap": 3.0, "slopes": True, "sinks": True, "offsets": 9}, 0.1),
}


def draw(p: float, sites: int, live: bool, tokens: torch.Tensor, keys=None) -> ProbabilityDropout | None:
    if p == 0.0:
        return None
    step = torch.tensor(7, device=tokens.device) if live else 7
    numbers = torch.tensor([4_000_000_000 - i for i in range(sites)], device=tokens.device)
    return ProbabilityDropout(Dropout(p, (5 << 33) + 3_000_000_000, 0, step), numbers, tokens, keys)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.to(wanted.dtype) - wanted).norm() / wanted.norm()).item()


def random(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def drawn(case, live: bool, device: str, dtype: torch.dtype):
    """(q, k and v, the arguments of both kinds of attention behind the documents, the gradient of the result)"""
    bounds, heads, kv_heads, dim, window, kind, p = case
    torch.manual_seed(0)
    total = bounds[-1]
    packed = random(total, (heads + 2 * kv_heads) * dim, device=device, dtype=dtype).unflatten(1, (-1, dim))
    parts = [x.detach().requires_grad_() for x in packed.split([heads, kv_heads, kv_heads], 1)]  # views, as in a layer
    kind = dict(kind)
    if kind.get("slopes"):
        kind["slopes"] = torch.rand(heads, device=device) * 0.1
    if kind.get("sinks"):
        kind["sinks"] = torch.randn(heads, device=device)
    if kind.get("offsets"):
        kind["offsets"] = torch.randn(heads, 2 * kind["offsets"] + 1, device=device)
    dropout = draw(p, heads, live, torch.arange(total, device=device) + (1 << 33) + 13)
    return parts, (window, Scores(**kind), dropout), random(total, heads, dim, device=device, dtype=dtype)


def documents_of(bounds: tuple[int, ...], longest: int, device: str) -> Documents:
    if len(runs_of(bounds)) == 1:
        return Documents(len(bounds) - 1, bounds[1])
    # empty documents behind the last, and a bound above the longest
    on_device = torch.tensor([*bounds, bounds[-1], bounds[-1]], dtype=torch.int32, device=device)
    return Documents(len(bounds) + 1, longest, on_device)


def results(case, live: bool, longest: int, device: str, dtype: torch.dtype, wide: torch.dtype):
    """(what the kernels give: the result, dq, dk and dv; the same once more; what plain torch gives)"""
    parts, how, dout = drawn(case, live, device, dtype)
    documents = documents_of(case[0], longest, device)
    found = []
    for _ in range(2):
        out = fused_attention(*parts, documents, *how)
        found.append((out, *torch.autograd.grad(out, parts, dout)))
    exact = [x.detach().to(wide).requires_grad_() for x in parts]
    wanted = tiled_attention(*exact, runs_of(case[0]), *how)
    return *found, (wanted, *torch.autograd.grad(wanted, exact, dout.to(wide)))


@pytest.mark.gpu
@pytest.mark.parametrize("split", [False, True], ids=["keys of all heads", "keys of each head"])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_as_in_plain_torch(name, live, split, monkeypatch):
    monkeypatch.setattr(fused, "_parts", lambda group, *counts: group if split else 1)
    ours, again, wanted = results(CASES[name], live, 512, "cuda", torch.bfloat16, torch.float32)
    for number, (one, other) in enumerate(zip(ours, wanted, strict=True)):
        assert apart(one, other) < (1.2e-2 if number else 6e-3), number
    assert all(map(torch.equal, ours, again))


class Launches:
    """In place of a kernel: the constants that it is launched with."""

    def __init__(self):
        self.constants = []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.constants.append(constants)

        return launch


@pytest.mark.parametrize("dim, window, p", [(128, None, 0.0), (128, 300, 0.0), (64, None, 0.1), (256, 300, 0.0)])
def test_constants_do_not_depend_on_bounds_that_are_rounded_up(dim, window, p, monkeypatch):
    """A CUDA graph has room for more and longer documents than the microbatch that readied its kernels: it finds them
    compiled, and sums in the same order.
    """
    from megalora.ops import attention_kernels as kernels

    monkeypatch.setattr(fused, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(fused, "_large_shared_memory", lambda: True)
    launches = []
    for count, longest in ((8, 128), (16, 1024)):
        launches.append({name: Launches() for name in ("forward_kernel", "query_kernel", "key_kernel")})
        for name, kernel in launches[-1].items():
            monkeypatch.setattr(kernels, name, kernel)
        parts, how, dout = drawn(((0, 1024), 12, 2, dim, window, {}, p), False, "cpu", torch.bfloat16)
        documents = Documents(count, longest, torch.zeros(count + 1, dtype=torch.int32))
        torch.autograd.grad(fused_attention(*parts, documents, *how), parts, dout)
    first, second = ({name: kernel.constants for name, kernel in one.items()} for one in launches)
    assert first == second and all(first.values())


@pytest.mark.parametrize("name", [*SMALL, "cross attention"])
def test_in_the_interpreter(name):
    run_interpreted(__file__, name)


def interpreted(name: str) -> None:
    """Compare in float32, where nothing is rounded to 16 bits: dk and dv of all heads that share keys in one kernel,
    and of each head in two.
    """
    fused._tiles = lambda D, kernel, *kind: (16, 32, 4, 1) if kernel in ("keys", "dk", "dv") else (32, 32, 4, 1)
    for split in (False, True):
        fused._parts = lambda group, *counts, split=split: group if split else 1
        fused._key_passes = lambda D, places, split=split: ("dk", "dv") if split else ("keys",)
        if name == "cross attention":
            ours, again, wanted = crossed()
        else:
            ours, again, wanted = results(SMALL[name], True, 160, "cpu", torch.float32, torch.float64)
        for number, (one, other) in enumerate(zip(ours, wanted, strict=True)):
            assert other.abs().max() > 1e-3 and apart(one, other) < 2e-6, (number, apart(one, other))
        assert all(map(torch.equal, ours, again))


def crossed():
    """Return as results() what cross attention with dropout gives."""
    torch.manual_seed(0)
    bounds, key_bounds = (0, 40, 47, 160), (0, 13, 70, 70)
    kind = {"device": "cpu", "dtype": torch.float32}
    q, k, v, dout = (random(n, 4, 16, **kind) for n in (160, 70, 70, 160))
    parts = [x.requires_grad_() for x in (q, k, v)]
    dropout = draw(0.2, 4, False, torch.arange(160) + 100, torch.arange(70) + 3)
    documents = Documents(3, 113, *(torch.tensor(x, dtype=torch.int32) for x in (bounds, key_bounds)), 57)
    found = []
    for _ in range(2):
        out = fused_attention(*parts, documents, None, Scores(causal=False), dropout)
        found.append((out, *torch.autograd.grad(out, parts, dout)))
    exact = [x.detach().double().requires_grad_() for x in parts]
    wanted = cross_attention(*exact, Crossing(bounds, key_bounds), 16**-0.5, dropout)
    return *found, (wanted, *torch.autograd.grad(wanted, exact, dout.double()))


@pytest.mark.gpu
def test_cross_attention_with_dropout():
    torch.manual_seed(0)
    assert fuses(64, torch.bfloat16, torch.device("cuda"))
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


if __name__ == "__main__":
    interpreted(sys.argv[1])
