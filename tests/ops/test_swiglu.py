"""SwiGLU against its formula under autograd."""

import pytest
import torch

from megalora.ops.swiglu import swiglu


def formula(gate, up):
    return torch.nn.functional.silu(gate) * up


def pair(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 10, generator=generator) * 4).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients(dtype):
    gate, up = pair(dtype)
    dy = torch.randn(6, 10).to(dtype)
    ours, theirs = swiglu(gate, up), formula(gate, up)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (gate, up), dy), torch.autograd.grad(theirs, (gate, up), dy), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, pair())


def test_inputs_are_left_alone_and_only_they_are_kept():
    gate, up = pair()
    before, kept = (gate.detach().clone(), up.detach().clone()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = swiglu(gate, up)
    y.sum().backward()
    assert gate.equal(before[0]) and up.equal(before[1])
    assert sorted(kept) == sorted((gate.data_ptr(), up.data_ptr()))
