"""Activations against transformers' own, values and gradients; and that each keeps one tensor."""

import sys
import weakref

import pytest
import torch
from interpreted import needs_triton, run_interpreted
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2CLS, ACT2FN

from megalora.ops import activations
from megalora.ops.activations import ACTIVATIONS, KEEPS_RESULT, gated_activation, work_of, xielu

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


def check_kernels(dtype: torch.dtype, device: str) -> None:
    """Values and gradients of xIELU's kernels against plain torch in float64, but for the rounding of `dtype`."""
    from megalora.ops.fused_xielu import FusedXIELU

    near = torch.tensor([0.0, -1e-6, -5e-7, -2e-6, 1e-7, -1e-4])
    x = torch.cat([torch.linspace(-14, 14, 4999), near]).to(device, dtype).requires_grad_()
    numbers = [torch.tensor(value, dtype=dtype, device=device) for value in ([0.3], [-1.7], 0.5, -1e-6)]
    dy = torch.sin(torch.arange(len(x))).to(device, dtype)
    wide = x.detach().double().requires_grad_()
    # torch rounds what the numbers are made into, and so do the kernels: inverses of rounded softplus.
    rounded = [torch.nn.functional.softplus(one).double() for one in numbers[:2]]
    slope = (numbers[2] + rounded[1].to(dtype)).double() - numbers[2].double()
    alphas = [torch.log(torch.expm1(one)) for one in (rounded[0], slope)]
    wanted = xielu(wide.cpu(), *[one.cpu() for one in (*alphas, numbers[2].double(), numbers[3].double())])
    found = FusedXIELU.apply(x, *numbers)
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=tolerance, atol=tolerance)
    small = x.detach().cpu().abs() < 1  # digits are not lost near 0
    least = 1e-7 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(found.double().cpu()[small], wanted[small], rtol=tolerance, atol=least)
    gradients = [torch.autograd.grad(y, v, d)[0] for y, v, d in ((found, x, dy), (wanted, wide, dy.double().cpu()))]
    torch.testing.assert_close(gradients[0].double().cpu(), gradients[1].cpu(), rtol=tolerance, atol=tolerance)


@needs_triton
def test_kernels_of_xielu_in_the_interpreter():
    run_interpreted(__file__, "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_of_xielu(dtype):
    check_kernels(dtype, "cuda")


class Counted(TorchDispatchMode):
    """Counts operations, and the numbers that they read and write; views and new memory are neither."""

    def __init__(self):
        super().__init__()
        self.numbers = self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, schema = function(*args, **(kwargs or {})), function._schema
        views = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if not views and "empty" not in schema.name:
            read = list(args[1:] if schema.name == "aten::copy_" else args)  # what it copies into is written alone
            sized = [one for one in (*read, out) if isinstance(one, torch.Tensor)]
            self.numbers += sum(one.numel() * one.element_size() / 2 for one in sized)
            self.calls += 1
        return out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "xielu"])
def test_the_work_of_an_activation_is_that_of_its_operations(name, gated):
    if name == "xielu" and gated:
        return
    numbers = [torch.tensor(value, dtype=torch.bfloat16) for value in ([0.3], [-1.7], 0.5, -1e-6)]
    act = (lambda x: xielu(x, *numbers)) if name == "xielu" else ACTIVATIONS[name]
    x = torch.randn(64, 32 * (1 + gated), dtype=torch.bfloat16, requires_grad=True)
    with Counted() as forward:
        y = gated_activation(x, act) if gated else act(x)
    dy = torch.ones_like(y)
    with Counted() as backward:
        if y is not x:
            torch.autograd.grad(y, x, dy)
    for counted, told in zip((forward, backward), work_of(name, gated, "cpu"), strict=True):
        assert (counted.numbers / y.numel(), counted.calls) == (pytest.approx(told.tensors, abs=0.1), told.calls)


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


if __name__ == "__main__":
    check_kernels(getattr(torch, sys.argv[1]), "cpu")
