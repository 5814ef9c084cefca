"""SwiGLU against its formula under autograd."""

import pytest
import torch

from megalora.ops.dropout import Dropout, dropout
from megalora.ops.swiglu import swiglu, swiglu_backward

SIZE = 10


def formula(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(6, 2 * SIZE, generator=generator) * 4).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients(dtype):
    x = inputs(dtype)
    dy = torch.randn(6, SIZE).to(dtype)
    ours, theirs = swiglu(x), formula(x)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)
    (a,), (b,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
    assert a.dtype == dtype
    torch.testing.assert_close(a, b)


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, (inputs(),))


@pytest.mark.parametrize("room", [8, 3])
def test_room_is_left_behind_and_its_gradient_is_ignored(room):
    x, dy = inputs(), torch.randn(6, SIZE + room, dtype=torch.float64)
    wide, narrow = swiglu(x, room), swiglu(x)
    assert wide.shape == (6, SIZE + room) and wide[:, :SIZE].equal(narrow)
    (a,), (b,) = torch.autograd.grad(wide, x, dy), torch.autograd.grad(narrow, x, dy[:, :SIZE])
    assert a.equal(b)


def test_the_room_is_the_readers_to_fill():
    """Whoever reads the result writes there before backward: nothing that is kept may change by it."""
    x = inputs()
    wide = swiglu(x, 4)
    with torch.no_grad():
        wide[:, SIZE:] = float("nan")
    (a,) = torch.autograd.grad(wide[:, :SIZE].sum(), x)
    (b,) = torch.autograd.grad(formula(x).sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_a_view():
    x = inputs()
    dy = torch.randn(SIZE, 6, dtype=torch.float64).t()
    (a,), (b,) = torch.autograd.grad(swiglu(x), x, dy), torch.autograd.grad(formula(x), x, dy)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("room", [0, 8])
def test_inputs_are_left_alone_and_only_they_are_kept(room):
    x = inputs()
    before, kept = x.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.data_ptr(), t.numel())) or t, lambda t: t):
        y = swiglu(x, room)
    y[:, :SIZE].sum().backward()
    assert x.equal(before)
    assert kept == [(x.data_ptr(), x.numel())]


@pytest.mark.parametrize("draw", [None, Dropout(0.3, seed=1, site=2, step=3)], ids=["no dropout", "dropout"])
def test_backward_with_the_branch_that_reads_the_output(draw):
    """The gradient through s (dropout(x) A^T) as well, and x again for dA."""
    generator = torch.Generator().manual_seed(0)
    gate_up, dy, dz, A = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((7, 12), (7, 6), (7, 3), (3, 6))
    )
    index = torch.arange(7)
    leaf = gate_up.clone().requires_grad_()
    x = swiglu(leaf)
    mask = torch.ones_like(x) if draw is None else dropout(torch.ones_like(x), index, draw)
    (wanted,) = torch.autograd.grad([x, (x * mask) @ A.t()], leaf, [dy, dz])
    grad, again, dropped = swiglu_backward(dy.clone(), gate_up, (dz, A, index, draw))
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
    assert again.equal(x.detach()) and dropped is None
    plain, nothing, _ = swiglu_backward(dy, gate_up, None)
    (wanted,) = torch.autograd.grad(swiglu(leaf), leaf, dy)
    assert nothing is None
    torch.testing.assert_close(plain, wanted, rtol=1e-12, atol=1e-12)
