"""The activations of the CUDA kernels (csrc/cuda/gates.h), compiled for a CPU, against torch's in float64."""

import ctypes

import pytest
import torch
from cuda_on_cpu import compiled

from megalora.ops.swiglu import ACTS


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("emulated"), "gates.cpp")


def run(gates, act, g, d):
    value, backward = torch.empty_like(g), torch.empty_like(g)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (g, d, value, backward))
    gates.run(act.encode(), *pointers, ctypes.c_int64(len(g)))
    return value, backward


@pytest.mark.parametrize("act", ACTS)
def test_values_and_gradients_are_those_of_float64(gates, act):
    g = torch.cat([torch.linspace(-16, 16, 4001), torch.tensor([-0.0, 88.0, -88.0, 1e4, -1e4, 1e10, -1e10])])
    d = torch.sin(torch.arange(len(g)).float())
    exact = g.double().requires_grad_()
    wanted = ACTS[act].value(exact)
    (wanted_backward,) = torch.autograd.grad(wanted, exact, d.double())
    value, backward = run(gates, act, g, d)
    torch.testing.assert_close(value.double(), wanted.detach(), rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(backward.double(), wanted_backward, rtol=3e-7, atol=3e-6)
