"""The C++ attention of the CPU against the formula in float64, on documents and windows on each side of its tiles."""

import pytest
import torch

from megalora.ops import extension
from megalora.ops.attention import attention

pytestmark = pytest.mark.skipif(not extension.has_kernels("cpu"), reason="no megalora._C: " + extension.REMEDY)

ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DOCUMENTS = [[5], [64], [1, 65, 17, 33], [200], [0, 16, 0, 1]]


def formula(q, k, v, bounds, window):
    each = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(each, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    place = torch.arange(len(q))
    document = torch.bucketize(place, torch.tensor(bounds[1:]), right=True)
    behind = place[:, None] - place
    seen = (behind >= 0) & (behind < (window or len(q))) & (document[:, None] == document)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def inputs(lengths, heads, kv_heads, dim, dtype):
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    shapes = [(sum(lengths), n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q, k, v, dout = (torch.randn(*s, generator=generator, dtype=torch.float64).mul(2).to(dtype) for s in shapes)
    return q, k, v, dout, bounds


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
@pytest.mark.parametrize("heads, kv_heads, dim, window", [(4, 2, 10, None), (2, 2, 64, 70), (3, 1, 24, 1)])
def test_value_and_gradients(dtype, lengths, heads, kv_heads, dim, window):
    q, k, v, dout, bounds = inputs(lengths, heads, kv_heads, dim, dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = formula(*exact, bounds, window)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, dout.double())]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = attention(*leaves, bounds, window)
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    for found, right in zip(results[0], wanted, strict=True):
        assert found.dtype == dtype and found.shape == right.shape
        assert (found.double() - right).abs().max() <= ROUNDING[dtype] * right.abs().max().clamp(min=4)


@pytest.mark.parametrize("scale", [1e-30, 40.0])
def test_scores_of_any_size(scale):
    """All alike; and so far apart that one key takes all."""
    q, k, v, dout, bounds = inputs([130], 2, 1, 16, torch.float32)
    leaves = [(q * scale).requires_grad_(), (k * scale).requires_grad_(), v.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    ours, right = attention(*leaves, bounds), formula(*exact, bounds, None)
    torch.testing.assert_close(ours.double(), right, rtol=1e-3, atol=1e-3)
    found, wanted = torch.autograd.grad(ours, leaves, dout), torch.autograd.grad(right, exact, dout.double())
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))


def test_heads_that_are_views():
    """As a cut of qkv leaves them, and a gradient with heads before tokens."""
    qkv = torch.randn(40, 8, 12, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in qkv.split([4, 2, 2], 1))
    dout = torch.randn(4, 12, 40, dtype=torch.float64).permute(2, 0, 1)
    views, copies = (attention(*(make(x) for x in (q, k, v)), [0, 40]) for make in (lambda x: x, torch.clone))
    assert views.equal(copies)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in (views, copies)), strict=True):
        assert a.equal(b)


def arguments():
    q, k, v, dout, bounds = inputs([7, 9], 4, 2, 8, torch.float32)
    out, lse = torch.empty_like(q), torch.zeros(4, 16)
    return {
        "attention_": (q, k, v, bounds, 16, out, lse),
        "attention_backward_": (dout, q, k, v, out, lse, bounds, 16, *(torch.empty_like(q) for _ in range(3))),
    }


@pytest.mark.parametrize("name", arguments())
def test_ops_are_well_registered(name):
    torch.library.opcheck(getattr(torch.ops.megalora, name).default, arguments()[name])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, bounds, *rest: (q, k, v, [0, 17], *rest),
        lambda q, k, v, bounds, *rest: (q, k, v, [0, 9, 7, 16], *rest),
        lambda q, k, v, *rest: (q[:, :3], k, v, *rest),
        lambda q, k, v, *rest: (q, k, v.double(), *rest),
        lambda q, k, v, bounds, window, *rest: (q, k, v, bounds, 0, *rest),
    ],
)
def test_op_quotes_the_condition_that_fails(change):
    with pytest.raises(RuntimeError, match=r"megalora: .*does not hold"):
        torch.ops.megalora.attention_(*change(*arguments()["attention_"]))
