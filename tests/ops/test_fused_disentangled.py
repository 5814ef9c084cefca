"""DeBERTa's attention by kernels against tiles of plain torch: on a GPU, and in Triton's interpreter on a CPU.

Both need triton, which comes with torch for GPUs.
"""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from interpreted import needs_triton, run_interpreted
from oracle import Run, train

from megalora.models.blocks.disentangled import places_of
from megalora.models.spec import Disentangled
from megalora.ops import disentangled_attention as op
from megalora.ops import fused_disentangled as fused
from megalora.ops.attention import documents_of, pack
from megalora.ops.dropout import Dropout
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.ops.tiled_attention import Scores

pytestmark = needs_triton
LARGE = Disentangled("table", 64, 256, None, None, furthest=512)  # DeBERTa-v3's
EVEN, CUT = (0, 512, 1024), (0, 37, 300, 301, 1020)
CASES = {
    "deberta-v3": (EVEN, 64, LARGE, "c2p p2c", 0.1),
    "cut": (CUT, 64, LARGE, "c2p p2c", 0.1),
    "no dropout": (CUT, 64, LARGE, "c2p p2c", 0.0),
    "c2p, far": (CUT, 64, Disentangled("table", 64, 30, None, None, furthest=100), "c2p", 0.2),
    "p2c, deberta": (CUT, 128, Disentangled("table", 64, 512, None, None), "p2c", 0.2),
    "odd heads": (CUT, 36, LARGE, "c2p p2c", 0.1),
}
SMALL = {
    "cut": ((0, 37, 58, 59, 70), 16, Disentangled("table", 16, 12, None, None, furthest=40), "c2p p2c", 0.3),
    "even": ((0, 40), 16, Disentangled("table", 16, 5, None, None), "c2p p2c", 0.0),
    "c2p": ((0, 20, 40), 8, Disentangled("table", 8, 12, None, None, furthest=40), "c2p", 0.2),
    "p2c": ((0, 3, 60), 16, Disentangled("table", 16, 9, None, None, furthest=30), "p2c", 0.2),
}
SCORES = Scores(0.08, causal=False)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def drawn(case, heads: int, device: str, dtype: torch.dtype, live: bool = False):
    """(q, k, v, K and Q or None, places, dropout, the gradient of the result)"""
    bounds, dim, spec, terms, p = case
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    packed = random(bounds[-1], 3 * heads * dim).unflatten(1, (-1, dim))
    q, k, v = (x.detach().requires_grad_() for x in packed.split(heads, 1))  # views, as in a layer
    table = random(2 * spec.span, 2 * heads * dim).unflatten(1, (-1, dim))
    rows = [
        x.detach().requires_grad_() if kind in terms else None
        for x, kind in zip(table.split(heads, 1), ("c2p", "p2c"), strict=True)
    ]
    dropout = None
    if p:
        step = torch.tensor(7, device=device) if live else 7
        sites = torch.tensor([4_000_000_000 - i for i in range(heads)], device=device)
        tokens = torch.arange(bounds[-1], device=device) + (1 << 33) + 13
        dropout = ProbabilityDropout(Dropout(p, (5 << 33) + 3_000_000_000, 0, step), sites, tokens)
    return q, k, v, rows, places_of(spec, device), dropout, random(bounds[-1], heads, dim)


def results(case, heads: int, device: str, dtype: torch.dtype, wide: torch.dtype, live: bool = False):
    """([result and gradients of the kernels], the same of a repetition, the same of plain torch in `wide`)"""
    *sources, rows, places, dropout, dout = drawn(case, heads, device, dtype, live)
    bounds, dim = case[:2]
    documents = documents_of(bounds, pack(bounds, dim, dtype, torch.device(device)), torch.device(device))
    leaves = [x for x in (*sources, *rows) if x is not None]

    def ours() -> list[torch.Tensor]:
        found = fused.fused_disentangled(*sources, *rows, *places, documents, SCORES, dropout)
        return [found, *torch.autograd.grad(found, leaves, dout)]

    wider = [None if x is None else x.detach().to(wide).requires_grad_() for x in (*sources, *rows)]
    wanted = op.disentangled_attention(*wider[:3], op.Positions(*wider[3:], *places), bounds, SCORES, dropout)
    gradients = torch.autograd.grad(wanted, [x for x in wider if x is not None], dout.to(wide))
    return ours(), ours(), [wanted, *gradients]


@pytest.mark.gpu
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_as_in_plain_torch(name, live, monkeypatch):
    ours, again, wanted = results(CASES[name], 4, "cuda", torch.bfloat16, torch.float32, live)
    assert apart(ours[0], wanted[0]) < 8e-3
    for one, other in zip(ours[1:], wanted[1:], strict=True):
        assert apart(one, other) < 1.5e-2
    assert all(map(torch.equal, ours, again))
    monkeypatch.setattr(fused, "_AT_ONCE", 1)  # a head at a time
    by_head = results(CASES[name], 4, "cuda", torch.bfloat16, torch.float32, live)[0]
    assert all(apart(one, other) < 1.5e-2 for one, other in zip(by_head, wanted, strict=True))


@pytest.mark.gpu
def test_a_model_takes_the_kernels():
    *sources, rows, places, dropout, _ = drawn(CASES["cut"], 4, "cuda", torch.bfloat16)
    out = op.disentangled_attention(*sources, op.Positions(*rows, *places), CUT, SCORES, dropout)
    assert out.grad_fn is not None and out.grad_fn.name() == "_FusedBackward"


@pytest.mark.parametrize("name", [*SMALL, "deberta-v2 model"])
def test_in_the_interpreter(name):
    run_interpreted(__file__, name)


def interpreted(name: str) -> None:
    """Compare in float32, where nothing is rounded to 16 bits: steps of a model, or the op, also a head at a time."""
    fused.fused._tiles = lambda D, kernel, *kind: (16, 32, 4, 1) if kernel == "keys" else (32, 16, 4, 1)
    if name.endswith(" model"):
        return interpreted_model(name.removesuffix(" model"))
    for most in (fused._AT_ONCE, 1):
        fused._AT_ONCE = most
        ours, again, wanted = results(SMALL[name], 2, "cpu", torch.float32, torch.float64)
        for number, (one, other) in enumerate(zip(ours, wanted, strict=True)):
            assert other.abs().max() > 1e-3 and apart(one, other) < 2e-6, (number, apart(one, other))
        assert all(map(torch.equal, ours, again))


def interpreted_model(family: str) -> None:
    """Compare the losses and all gradients of steps of packed rows, with every dropout and a B that is not zero."""
    run = Run(family, task="TOKEN_CLS", steps=1, rows=1, dtype=torch.float32, model={"num_hidden_layers": 2})
    wanted, calls = train(0, 1, run.on(dtype=torch.float64)), []
    with mock.patch.object(op, "fuses", lambda *kind: calls.append(kind) or True):
        ours = train(0, 1, run)
    assert calls and ours.losses == pytest.approx(wanted.losses, rel=1e-5)
    for key, (_, gradient) in wanted.gradients.items():
        assert gradient.abs().max() > 1e-9 and apart(ours.gradients[key][1], gradient) < 1e-3, key


if __name__ == "__main__":
    interpreted(sys.argv[1])
