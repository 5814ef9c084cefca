"""Factors of columns: the formula, the gradient of the factors, and on a GPU the kernels against the reference."""

import pytest
import torch

from megalora.ops.column_scale import scale_columns, scale_columns_, scale_columns_backward


def make(rows: int, size: int, dtype: torch.dtype, device: str = "cpu"):
    generator = torch.Generator().manual_seed(rows + size)
    x, dy = (torch.randn(rows, size, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2))
    g = torch.rand(size, generator=generator, dtype=torch.float64).to(device, torch.promote_types(dtype, torch.float32))
    return x, dy, g + 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formula(dtype):
    x, dy, g = make(7, 24, dtype)
    leaf, factors = (one.double().clone().requires_grad_() for one in (x, g))
    (leaf * factors * dy.double()).sum().backward()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    dx, dots = scale_columns_backward(dy, x, g)
    torch.testing.assert_close(dx.double(), leaf.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dots.double(), factors.grad, rtol=tolerance, atol=tolerance * 7)
    y = scale_columns(x, g, torch.ones(24, dtype=dtype))
    torch.testing.assert_close(y.double(), (leaf * factors).detach() + 1, rtol=tolerance, atol=tolerance)
    assert (dx.dtype, dots.dtype, y.dtype) == (dtype, g.dtype, dtype)
    assert scale_columns_backward(dy, None, g)[1] is None
    before = x.clone()
    assert scale_columns_(x, g) is x and torch.equal(x, scale_columns(before, g))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows, size", [(1, 8), (64, 2048), (1000, 4104), (130, 28672)])
def test_kernels(rows, size, dtype):
    x, dy, g = make(rows, size, dtype, "cuda")
    dx, dots = scale_columns_backward(dy, x, g)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(dx.float(), dy.float() * g, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dots, (dy.double() * x.double()).sum(0).float(), rtol=1e-4, atol=1e-3)
    again = scale_columns_backward(dy, x, g)
    assert torch.equal(again[0], dx) and torch.equal(again[1], dots)
    wanted = x.float() * g
    torch.testing.assert_close(scale_columns_(x, g).float(), wanted, rtol=tolerance, atol=tolerance)
