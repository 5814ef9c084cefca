"""Softmax cross entropy in two passes over parts of the vocabulary, against torch's on the whole."""

import pytest
import torch

from megalora.ops.cross_entropy import gradient_, statistics_

N, V = 9, 14


def logits(dtype=torch.float64, scale=3.0):
    return (torch.randn(N, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).to(dtype)


LABEL = torch.tensor([0, 13, 5, 5, 7, 1, 12, 6, 3])


def expected(x):
    """(loss of each row, its gradient), in x's dtype or at least float32."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, LABEL, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def test_statistics_are_those_of_the_rows():
    x = logits()
    before = x.clone()
    maximum, total, target = statistics_(x, LABEL)
    assert maximum.equal(before.max(-1).values) and target.equal(before[torch.arange(N), LABEL])
    torch.testing.assert_close(total, (before - maximum[:, None]).exp().sum(-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(total.log() + maximum - target, expected(before)[0], rtol=1e-13, atol=1e-13)


def test_the_gradient_takes_the_place_of_the_logits():
    x = logits()
    _, wanted = expected(x)
    maximum, total, _ = statistics_(x, LABEL)
    found = gradient_(x, LABEL, maximum, maximum, total)
    assert found is x
    torch.testing.assert_close(x, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bounds", [(0, 7, 14), (0, 5, 6, 14), (0, 1, 13, 14)])
def test_parts_of_the_vocabulary_make_the_whole(bounds):
    """A label outside a part, on either side of it, counts nothing there: also the first beyond each end."""
    x = logits()
    loss, grad = expected(x)
    parts = [x[:, a:b].contiguous() for a, b in zip(bounds, bounds[1:], strict=False)]
    labels = [LABEL - start for start in bounds[:-1]]
    found = [statistics_(part, label) for part, label in zip(parts, labels, strict=True)]
    maximum = torch.stack([m for m, _, _ in found]).amax(0)
    total = sum(t * (m - maximum).exp() for m, t, _ in found)
    for (_, _, target), label, part in zip(found, labels, parts, strict=True):
        mine = (label >= 0) & (label < part.shape[1])
        assert (target[~mine] == 0).all()
    target = sum(t for _, _, t in found)
    torch.testing.assert_close(total.log() + maximum - target, loss, rtol=1e-13, atol=1e-13)
    ours = [
        gradient_(part, label, local, maximum, total)
        for part, label, (local, _, _) in zip(parts, labels, found, strict=True)
    ]
    torch.testing.assert_close(torch.cat(ours, -1), grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_worked_out_in_float32(dtype):
    x = logits(dtype)
    loss, grad = expected(x)
    stats = statistics_(x, LABEL)
    assert stats.dtype == torch.float32
    maximum, total, target = stats
    torch.testing.assert_close(total.log() + maximum - target, loss)
    found = gradient_(x, LABEL, maximum, maximum, total)
    assert found is x and x.dtype == dtype
    torch.testing.assert_close(x, grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_do_not_overflow(dtype):
    x = logits(dtype, scale=5e3)  # exp of any of them would
    loss, grad = expected(x)
    maximum, total, target = statistics_(x, LABEL)
    torch.testing.assert_close(total.log() + maximum - target, loss)
    assert loss.max() > 1e3
    torch.testing.assert_close(gradient_(x, LABEL, maximum, maximum, total), grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_view_of_wider_rows(dtype):
    wide = torch.zeros(N, V + 3, dtype=dtype)
    wide[:, :V] = logits(dtype)
    _, grad = expected(wide[:, :V])
    maximum, total, _ = statistics_(wide[:, :V], LABEL)
    gradient_(wide[:, :V], LABEL, maximum, maximum, total)
    torch.testing.assert_close(wide[:, :V], grad.to(dtype))
    assert not wide[:, V:].any()
