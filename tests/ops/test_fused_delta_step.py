"""A step of linear attention in kernels: what plain torch gives, in the slots of its sequences alone."""

import sys

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from megalora.ops import delta_mixer as op

SLOTS, IDLE = 7, 6
ROWS = [4, IDLE, 0, 3, IDLE, IDLE]  # of three sequences, and what fills the step up
CASES = {  # heads, tokens of the convolution, dtype
    "plain": (op.Heads(2, 2, 16, 32), 4, torch.float32),
    "odd": (op.Heads(3, 1, 6, 40), 2, torch.bfloat16),
    "one": (op.Heads(1, 3, 8, 5), 1, torch.float16),
}


def drawn(heads: op.Heads, width: int, dtype: torch.dtype, device: str, rows: int):
    """(y, which is part of a wider tensor, weights, what all slots keep)"""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(of).to(device)

    number, wide = heads.groups * heads.repeats, torch.float32
    decay, bias = random(number, of=wide), random(number, of=wide) * 8
    weights = op.DeltaWeights(random(heads.channels, width), decay, bias, 1 + random(heads.value) / 4, 1e-6)
    y = random(rows, sum(heads.widths) + 8)[:, : sum(heads.widths)]
    states = random(SLOTS, number, heads.key, heads.value, of=wide)
    return y, weights, op.Kept(random(SLOTS, width - 1, heads.channels), states)


def check(heads: op.Heads, width: int, dtype: torch.dtype, device: str, rows: list[int]) -> None:
    """Two steps, one behind the other, are those of plain torch; other slots, the idle one too, keep every bit."""
    from megalora.ops.fused_delta_step import fused_delta_step

    y, weights, kept = drawn(heads, width, dtype, device, len(rows))
    slots = torch.tensor(rows, device=device)
    live = [i for i, slot in enumerate(rows) if slot != IDLE]
    own = [rows[i] for i in live]
    wanted, before = op.Kept(*(x.clone().cpu() for x in kept)), op.Kept(*(x.clone() for x in kept))
    tensors = weights.convolution, weights.decay, weights.bias, weights.norm
    on_cpu = op.DeltaWeights(*(x.cpu() for x in tensors), weights.eps)
    # In 16 bits q, k and v are rounded behind the convolution, which Triton's interpreter does towards zero.
    least = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for factor in (1, -2):
        out = fused_delta_step(y * factor, heads, tensors, kept, slots, IDLE, weights.eps, op.EPSILON)
        expected = op.delta_mixer_step((y * factor)[live].cpu(), heads, on_cpu, wanted, torch.tensor(own))
        assert out.dtype == dtype and not out[[i for i in range(len(rows)) if i not in live]].any()
        torch.testing.assert_close(out[live].cpu(), expected, rtol=least, atol=least)
        assert torch.equal(kept.channels[own].cpu(), wanted.channels[own])
        torch.testing.assert_close(kept.states[own].cpu(), wanted.states[own], rtol=least, atol=least)
    others = [slot for slot in range(SLOTS) if slot not in own]
    assert all(torch.equal(now[others], then[others]) for now, then in zip(kept, before, strict=True))
    assert (kept.states[own] != before.states[own]).any(-1).any(-1).all(), "each head of each sequence has moved"


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name):
    run_interpreted(__file__, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "heads", [op.Heads(16, 2, 128, 128), op.Heads(4, 1, 64, 48), op.Heads(3, 2, 6, 256), op.Heads(2, 2, 256, 10)]
)
@pytest.mark.parametrize("rows", [[2], ROWS], ids=["one", "several"])
def test_kernels(heads, dtype, rows):
    check(heads, 4, dtype, "cuda", rows)


@pytest.mark.gpu
def test_a_model_takes_the_kernels(monkeypatch):
    heads, width, dtype = op.Heads(4, 2, 64, 64), 4, torch.bfloat16
    y, weights, kept = drawn(heads, width, dtype, "cuda", 1)
    monkeypatch.setattr(op, "delta_step", None)
    assert op.delta_mixer_step(y, heads, weights, kept, torch.tensor([2], device="cuda")).isfinite().all()


def test_what_the_kernels_take(monkeypatch):
    weights = drawn(*CASES["plain"], "cpu", 1)[1]
    heads = CASES["plain"][0]
    monkeypatch.setattr(op, "has_triton", lambda: True)
    assert op.takes_step("cuda", torch.bfloat16, heads, weights)
    assert not op.takes_step("cpu", torch.bfloat16, heads, weights)
    assert not op.takes_step("cuda", torch.float64, heads, weights)
    assert not op.takes_step("cuda", torch.bfloat16, heads._replace(value=512), weights)
    monkeypatch.setattr(op, "has_triton", lambda: False)
    assert not op.takes_step("cuda", torch.bfloat16, heads, weights)


if __name__ == "__main__":
    check(*CASES[sys.argv[1]], "cpu", ROWS)
