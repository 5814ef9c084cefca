"""Activations against transformers' own, values and gradients; and that each keeps one tensor."""

import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN

from megalora.ops.activations import ACTIVATIONS, KEEPS_RESULT, xielu

WITH_PARAMETERS = {"prelu", "xielu"}


def test_every_activation_without_parameters_is_there():
    assert set(ACTIVATIONS) == set(ACT2CLS) - WITH_PARAMETERS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_those_of_transformers(name):
    x = torch.linspace(-14, 14, 301, dtype=torch.float64).requires_grad_()
    ours, theirs = ACTIVATIONS[name](x), ACT2FN[name](x)
    assert (ours - theirs).abs().max() <= 1e-9
    dy = torch.sin(torch.arange(301, dtype=torch.float64))
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-9


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"linear"}))
def test_one_tensor_is_kept(name):
    saved = []
    x = torch.randn(5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = ACTIVATIONS[name](x)
    assert saved == [(y if name in KEEPS_RESULT else x).data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_xielu_is_that_of_transformers(dtype):
    """Bit for bit, with numbers as a layer may have learned them; only what it reads is kept."""
    theirs = ACT2CLS["xielu"](dtype=dtype)
    with torch.no_grad():
        theirs.alpha_p.fill_(0.3), theirs.alpha_n.fill_(-1.7)
    numbers = [x.detach() for x in (theirs.alpha_p, theirs.alpha_n, theirs.beta, theirs.eps)]
    x = torch.cat([torch.linspace(-14, 14, 301), torch.tensor([0.0, -5e-7, -2e-6, 1e-7])]).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ours = xielu(x, *numbers)
    assert saved == [x.data_ptr()] and torch.equal(ours, theirs(x))
    dy = torch.sin(torch.arange(305)).to(dtype)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs(x))))
