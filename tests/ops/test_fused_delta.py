"""Linear attention by kernels against float64 in plain torch: on a GPU, and in Triton's interpreter on a CPU.

Both need triton, which comes with torch for GPUs.
"""

from __future__ import annotations

import itertools
import sys
from unittest import mock

import pytest
import torch
from delta_cases import HEADS, LAYOUTS, apart, by_kernels, drawn, in_torch, widened
from gpu_sizes import sizes
from interpreted import needs_triton, round_to_nearest, run_interpreted
from oracle import Run, train

from megalora.ops import delta_mixer as op
from megalora.ops import fused_delta as fused
from megalora.ops.delta_rule import Documents

pytestmark = needs_triton


def check(heads: op.Heads, bounds, dtype: torch.dtype, device: str, most: float | None, again: bool = True) -> None:
    """Kernels against float64: no more than `most` apart, or than 2.5 times what plain torch of that dtype is, whose
    rounding is of what it reads and of what it writes. `again`, by key heads, document by document and with room for
    more, to the bit.
    """
    y, weights, grad = drawn(heads, bounds[-1], dtype, device)
    ours = by_kernels(y, weights, grad, heads, bounds)
    exact = in_torch(y.double(), widened(weights), grad.double(), heads, bounds)
    plain = in_torch(y, weights, grad, heads, bounds)
    for name, found in ours.items():
        least = 1e-3 * float(exact["out" if name == "out" else "v"].norm())
        assert exact[name].norm() > least, name
        bound = 2.5 * apart(plain[name], exact[name]) if most is None else most
        assert apart(found, exact[name]) < bound, (name, apart(found, exact[name]), bound)
    if not again:
        return
    with mock.patch.object(fused, "MOST_ROWS", 1):
        other = by_kernels(y, weights, grad, heads, bounds)
    assert all(torch.equal(other[name], found) for name, found in ours.items())
    other = by_kernels(y, weights, grad, heads, bounds, room=len(bounds) + 2)
    assert all(torch.equal(other[name], found) for name, found in ours.items())
    for start, stop in [pair for pair in itertools.pairwise(bounds) if pair[0] < pair[1]][:2]:
        rows = slice(start, stop)
        alone = by_kernels(y[rows], weights, grad[rows], heads, (0, stop - start))
        assert all(torch.equal(alone[name], found[rows]) for name, found in ours.items()), (start, stop)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
def test_as_in_float64(heads, layout):
    check(HEADS[heads], LAYOUTS[layout], torch.bfloat16, "cuda", None)


@pytest.mark.gpu
def test_a_model_takes_the_kernels():
    heads = HEADS["9B"]
    y, weights, _ = drawn(heads, 100, torch.bfloat16, "cuda")
    assert op.delta_mixer(y.requires_grad_(), heads, weights, Documents.of([0, 100], "cuda")).grad_fn.name() == (
        "_FusedBackward"
    )
    wide = op.delta_mixer(y.float().detach().requires_grad_(), heads, weights, Documents.of([0, 100], "cuda"))
    assert wide.grad_fn.name() == "_MixerBackward"


@pytest.mark.parametrize("name", ["float32", "wide values", "bfloat16", "extremes", "rows apart", "model"])
def test_in_the_interpreter(name):
    run_interpreted(__file__, name)


def interpreted(name: str) -> None:
    fused.precision = lambda: "ieee"  # the interpreter has no products in parts
    fused.ROWS = dict.fromkeys(fused.ROWS, 64)
    if name == "float32":  # where nothing is rounded to 16 bits
        check(op.Heads(2, 2, 16, 16), (0, 3, 3, 68), torch.float32, "cpu", 4e-6)
    if name == "wide values":
        check(op.Heads(1, 1, 16, 64), (0, 129), torch.float32, "cpu", 4e-6, again=False)
    if name == "bfloat16":
        round_to_nearest()
        check(op.Heads(1, 2, 128, 128), (0, 5, 90), torch.bfloat16, "cpu", None, again=False)
    if name == "extremes":
        extremes()
    if name == "rows apart":
        rows_apart()
    if name == "model":
        model()


def extremes() -> None:
    """Equal keys, whose system is the hardest, and decays that leave nothing."""
    heads, bounds = op.Heads(1, 1, 16, 16), (0, 100)
    y, weights, grad = drawn(heads, 100, torch.float32)
    y[:, 16:32], y[:, 65] = y[:1, 16:32], 20.0
    weights.convolution[:, :-1] = 0.0
    weights.bias[:] = -12.0
    for bias, decay, most in ((-12.0, 0.0, 1e-4), (30.0, 2.8, 4e-6)):
        weights.bias[:], weights.decay[:] = bias, decay
        ours = by_kernels(y, weights, grad, heads, bounds)
        exact = in_torch(y.double(), widened(weights), grad.double(), heads, bounds)
        scale = max(float(one.norm()) for one in exact.values())
        for part, found in ours.items():
            assert found.isfinite().all(), part
            off = float((found.double() - exact[part]).norm())
            assert off < most * max(float(exact[part].norm()), 1e-3 * scale), (bias, part, off)


def rows_apart() -> None:
    """y whose rows do not begin on 16 bytes, or lie apart."""
    heads = op.Heads(1, 1, 16, 16)
    y, weights, grad = drawn(heads, 20, torch.float32)
    wide = torch.cat([y, y.new_full((20, 14), float("nan"))], 1)
    assert wide.stride(0) % 8 == 0 and y.stride(0) % 8 != 0
    ours = by_kernels(y, weights, grad, heads, (0, 20))
    other = by_kernels(wide[:, : y.shape[1]], weights, grad, heads, (0, 20))
    exact = in_torch(y.double(), widened(weights), grad.double(), heads, (0, 20))
    for name, found in ours.items():
        assert torch.equal(found, other[name]) and apart(found, exact[name]) < 4e-6, name


def model() -> None:
    """Compare the loss and all gradients of a step of packed rows, with a B that is not zero."""
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    fields = sizes("qwen3_next") | {"hidden_size": 64, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    run = Run("qwen3_5_text", steps=1, rows=1, dtype=torch.float32, model=fields, lora=lora)
    wanted, calls = train(0, 1, run.on(dtype=torch.float64)), []
    with mock.patch.object(fused, "fuses", lambda *kind: calls.append(kind) or True):
        ours = train(0, 1, run)
    assert calls and ours.losses == pytest.approx(wanted.losses, rel=1e-5)
    for key, (_, gradient) in wanted.gradients.items():
        assert gradient.abs().max() > 1e-9 and apart(ours.gradients[key][1], gradient) < 1e-3, key


if __name__ == "__main__":
    interpreted(sys.argv[1])
