"""Short convolutions of packed documents: torch's own of each document, and gradients."""

import itertools

import pytest
import torch

from megalora.ops.delta_rule import Documents
from megalora.ops.short_convolution import gated_convolution, short_convolution

BOUNDS = [0, 1, 8, 8, 10, 17]


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def of_each(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The convolution of each document [F, C] by torch."""
    width = weight.shape[1]
    parts = [x[start:stop].t() for start, stop in itertools.pairwise(BOUNDS) if start < stop]
    pad = torch.nn.functional.pad
    made = [
        torch.nn.functional.conv1d(pad(part, (width - 1, 0)), weight.unsqueeze(1), bias, groups=len(weight)).t()
        for part in parts
    ]
    return torch.cat(made)


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_each_document_alone(width, biased):
    weight, bias, ages = numbers(6, width), numbers(6) if biased else None, Documents.of(BOUNDS).ages
    x = numbers(17, 6).requires_grad_()
    close(short_convolution(x, weight, ages, bias), torch.nn.functional.silu(of_each(x, weight, bias)), x)
    y = numbers(17, 18).requires_grad_()
    b, c, v = y.chunk(3, -1)
    close(gated_convolution(y, weight, bias, ages), c * of_each(b * v, weight, bias), y)


def close(ours: torch.Tensor, theirs: torch.Tensor, x: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    before = x.detach().clone()
    grad = numbers(*theirs.shape)
    (a,), (b,) = (torch.autograd.grad(made, x, grad) for made in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("made, wide", [(short_convolution, 6), (gated_convolution, 18)])
def test_sixteen_bits_are_rounded_once(made, wide):
    x, weight, ages = numbers(17, wide).bfloat16(), numbers(6, 3).bfloat16(), Documents.of(BOUNDS).ages
    given = (weight, ages) if made is short_convolution else (weight, None, ages)
    exact = made(x.double(), *(one.double() if one is weight else one for one in given))
    assert (made(x, *given).double() - exact).abs().max() <= 2**-8 * exact.abs().max()
