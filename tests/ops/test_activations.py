"""Activations against transformers' own, values and gradients; and that each keeps one tensor."""

import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN

from megalora.ops.activations import ACTIVATIONS, KEEPS_RESULT

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
