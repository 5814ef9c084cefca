"""SwiGLU and GeGLU, and activations without a gate, against their formulas under autograd."""

from dataclasses import replace

import pytest
import torch
from transformers.activations import ACT2FN

from megalora.models import spec
from megalora.ops.activations import ACTIVATIONS
from megalora.ops.dropout import Dropout, dropout
from megalora.ops.swiglu import ACTS, swiglu, swiglu_backward, swiglu_down

SIZE = 10


GATED = pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])


def formula(gate_up, act="silu", gated=True):
    hf = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    if not gated:
        return ACT2FN[hf[act]](gate_up)
    gate, up = gate_up.chunk(2, -1)
    return ACT2FN[hf[act]](gate) * up


def inputs(dtype=torch.float64, gated=True):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(6, SIZE * (1 + gated), generator=generator) * 4).to(dtype).requires_grad_()


@GATED
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients(dtype, act, gated):
    x = inputs(dtype, gated)
    dy = torch.randn(6, SIZE).to(dtype)
    ours, theirs = swiglu(x, 0, act, gated), formula(x, act, gated)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)
    (a,), (b,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
    assert a.dtype == dtype
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("act", ACTS)
def test_gradcheck(act):
    assert torch.autograd.gradcheck(lambda x: swiglu(x, act=act), (inputs(),))


def test_the_names_of_hf_are_given_their_activation():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    linear = spec.Linear("up", 8, 16)
    found = {}
    for name, activation in ACTIVATIONS.items():
        mlp = spec.MLP(linear, linear, 16, name, gate=linear)
        found[name] = mlp.fused_act
        assert found[name] is None or ACTS[found[name]].value(x).equal(activation(x))
        assert replace(mlp, dropout=0.1).fused_act is None  # dropped between: torch makes what down reads
        assert replace(mlp, gate=None).fused_act == found[name]
    assert set(ACTS) == set(found.values()) - {None}
    assert [found[n] for n in ("swish", "gelu_new", "gelu", "relu")] == ["silu", "gelu_tanh", "gelu", None]


@GATED
@pytest.mark.parametrize("room", [8, 3])
def test_room_is_left_behind_and_its_gradient_is_ignored(room, gated):
    x, dy = inputs(gated=gated), torch.randn(6, SIZE + room, dtype=torch.float64)
    wide, narrow = swiglu(x, room, gated=gated), swiglu(x, gated=gated)
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


@GATED
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("draw", [None, Dropout(0.3, seed=1, site=2, step=3)], ids=["no dropout", "dropout"])
def test_backward_with_the_branch_that_reads_the_output(draw, act, gated):
    """The gradient through s (dropout(x) A^T) as well, and x again for dA."""
    generator = torch.Generator().manual_seed(0)
    gate_up, dy, dz, A = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((7, 6 * (1 + gated)), (7, 6), (7, 3), (3, 6))
    )
    index = torch.arange(7)
    leaf = gate_up.clone().requires_grad_()
    x = swiglu(leaf, 0, act, gated)
    wide = swiglu_down(gate_up, 8, A, index, draw, act)
    assert wide[:, :6].equal(x.detach())
    mask = torch.ones_like(x) if draw is None else dropout(torch.ones_like(x), index, draw)
    z = (x * mask) @ A.t()
    torch.testing.assert_close(wide[:, 6:], torch.cat([z, z.new_zeros(7, 5)], 1), rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad([x, z], leaf, [dy, dz])
    grad, again, dropped = swiglu_backward(dy.clone(), gate_up, (dz, A, index, draw), act)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
    assert again.equal(x.detach()) and dropped is None
    plain, nothing, _ = swiglu_backward(dy, gate_up, None, act)
    (wanted,) = torch.autograd.grad(swiglu(leaf, 0, act, gated), leaf, dy)
    assert nothing is None
    torch.testing.assert_close(plain, wanted, rtol=1e-12, atol=1e-12)
