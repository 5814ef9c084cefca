"""Activations against transformers' own, values and gradients; and that each keeps one tensor."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2CLS, ACT2FN

from megalora.ops import activations
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


class Made(TorchDispatchMode):
    """The most bytes of storages at a time that operations make, beside those of `given`."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.peak, self._held = 0, {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if storage._cdata not in self._held:
                self._held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._held.pop, storage._cdata, None)
            self.peak = max(self.peak, sum(self._held.values()))
        return out


@pytest.mark.parametrize("name", ["xielu", "quick_gelu", "laplace"])
def test_blocks_bound_the_temporaries(monkeypatch, name):
    """Little is made beside y and dx, which is what the plan counts; the numbers are those of one block."""
    numbers = [torch.tensor([0.3]), torch.tensor([-1.7]), torch.tensor(0.5), torch.tensor(-1e-6)]
    x = torch.linspace(-9, 9, 1001 * 64).view(1001, 64).requires_grad_()
    dy, found = torch.sin(x.detach() * 77), []
    for block in (activations.BLOCK, 7 * 64):
        monkeypatch.setattr(activations, "BLOCK", block)
        with Made(x, dy) as made:
            y = xielu(x, *numbers) if name == "xielu" else ACTIVATIONS[name](x)
            (dx,) = torch.autograd.grad(y, x, dy)
        found.append((y, dx, made.peak))
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    whole = x.numel() * x.element_size()
    assert found[0][2] > 4 * whole and found[1][2] < 2.2 * whole
