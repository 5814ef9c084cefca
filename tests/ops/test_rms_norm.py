"""RMSNorm against its formula under autograd, and against transformers' own in every dtype."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megalora.ops.rms_norm import rms_norm


def formula(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def inputs(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    return x.to(dtype).requires_grad_(), (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)


@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 8), (1, 1), (7, 1)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_value_and_gradient(shape, eps):
    x, weight = inputs(*shape)
    dy = torch.randn(shape, dtype=torch.float64)
    ours, theirs = rms_norm(x, weight, eps), formula(x, weight, eps)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    (a,), (b,) = (torch.autograd.grad(y, x, dy) for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x, weight = inputs(3, 6)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_transformers_in_low_precision(dtype):
    x, weight = inputs(6, 32, dtype=dtype)
    theirs = LlamaRMSNorm(32, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    ours = rms_norm(x, weight, 1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs(x))
    dy = torch.randn(6, 32).to(dtype)
    (a,), (b,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs(x), x, dy)
    assert a.dtype == dtype
    torch.testing.assert_close(a, b)


def test_the_sum_of_squares_does_not_overflow_float16():
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # 300^2 is more than float16 holds
    assert torch.equal(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_what_is_kept_for_backward():
    x, weight = inputs(50, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
    assert sum(kept) == x.numel() + weight.numel() + 50
