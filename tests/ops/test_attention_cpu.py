"""The C++ attention of the CPU against the formula in float64, on documents and windows on each side of its tiles."""

import math

import pytest
import torch

from megalora.ops import extension
from megalora.ops import tiled_attention as tiles
from megalora.ops.attention import Scores, attention

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


KINDS = {
    "scale (granite)": Scores(scale=0.0156),
    "softcap (gemma2)": Scores(scale=0.2, softcap=1.5),
    "softcap, far below it": Scores(scale=1e-3, softcap=50.0),
    "slopes (bloom, mpt)": Scores(slopes=torch.tensor([0.5, 0.25, 2.0, 2**-8], dtype=torch.float64)),
    "sinks (gpt_oss)": Scores(sinks=torch.tensor([-2.0, 40.0, 0.5, 9.0], dtype=torch.float64)),
    "all": Scores(0.7, 2.0, torch.tensor([0.5, 0.25, 0.125, 0.375]), sinks=torch.tensor([-1.0, 0.0, 1.5, 2.0])),
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scores_is_that_of_plain_torch(kind, window, dtype, monkeypatch):
    """Value and gradients against the tiles of plain torch in float64: the kernel must not come to them."""
    q, k, v, dout, bounds = inputs([1, 65, 17, 130], 4, 2, 10, dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    runs = [tiles.Run(a, 1, b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    wanted = tiles.tiled_attention(*exact, runs, window, KINDS[kind])
    wanted = [wanted, *torch.autograd.grad(wanted, exact, dout.double())]
    monkeypatch.setattr(tiles.TiledDocuments, "forward", lambda self: pytest.fail("plain torch"))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, bounds, window, scores=KINDS[kind])
    for found, right in zip([out, *torch.autograd.grad(out, leaves, dout)], wanted, strict=True):
        assert found.dtype == dtype and found.shape == right.shape
        # A sink of 40 leaves little: values are compared with what they are.
        assert (found.double() - right).abs().max() <= ROUNDING[dtype] * right.abs().max().clamp(min=1)


def test_softcap_is_as_exact_as_torchs_tanh():
    """On one key beside a key of score 0, the weight tells tanh of every size."""
    x = torch.logspace(-4, 1.5, 4000).flatten()
    x = torch.cat([x, -x])
    q = torch.stack([torch.zeros_like(x), x], 1).flatten().view(-1, 1, 1)
    k = torch.tensor([0.0, 1.0]).repeat(len(x)).view(-1, 1, 1)
    bounds = list(range(0, 2 * len(x) + 1, 2))
    found = attention(q, k, k, bounds, scores=Scores(scale=1.0, softcap=1.0))[1::2, 0, 0]
    right = torch.sigmoid(x.double().tanh())
    assert (found.double() - right).abs().max() <= 1.5e-7


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
    how = bounds, 16, 0.3, 1.5, torch.rand(4)
    return {
        "attention_": (q, k, v, *how, torch.rand(4), out, lse),
        "attention_backward_": (dout, q, k, v, out, lse, *how, *(torch.empty_like(q) for _ in range(3))),
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
        lambda q, k, v, bounds, window, scale, *rest: (q, k, v, bounds, window, math.inf, *rest),
        lambda q, k, v, bounds, window, scale, cap, *rest: (q, k, v, bounds, window, scale, -1.0, *rest),
        lambda *front_and_rest: (*front_and_rest[:7], torch.rand(3), *front_and_rest[8:]),
        lambda *front_and_rest: (*front_and_rest[:8], torch.rand(4).double(), *front_and_rest[9:]),
    ],
)
def test_op_quotes_the_condition_that_fails(change):
    with pytest.raises(RuntimeError, match=r"megalora: .*does not hold"):
        torch.ops.megalora.attention_(*change(*arguments()["attention_"]))
