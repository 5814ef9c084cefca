"""Scale, softcap, ALiBi and bidirectional attention against the formula: as `attention` chooses, and in tiles."""

import math

import pytest
import torch

from megalora.ops import tiled_attention as tiles
from megalora.ops.attention import Scores, attention, cached_attention
from megalora.ops.decode_attention import decode_attention

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.75], dtype=torch.float64)
SCORES = {
    "scale": Scores(scale=0.31),
    "softcap": Scores(softcap=1.5),
    "slopes": Scores(slopes=SLOPES),
    "both ways": Scores(causal=False),
    "all": Scores(scale=0.8, softcap=2.0, slopes=SLOPES, causal=False),
    "all, causal": Scores(scale=0.8, softcap=2.0, slopes=SLOPES),
}
BOUNDS = [[0, 16], [0, 4, 8, 12, 16], [0, 1, 2, 9, 16]]


def formula(q, k, v, bounds, window, how):
    each = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(each, 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if how.scale is None else how.scale)
    if how.softcap is not None:
        s = how.softcap * (s / how.softcap).tanh()
    place = torch.arange(len(q))
    behind = place[:, None] - place
    if how.slopes is not None:
        s = s - how.slopes[:, None, None].to(s.dtype) * behind.abs()
    document = torch.bucketize(place, torch.tensor(bounds[1:]), right=True)
    seen = document[:, None] == document
    if how.causal:
        seen = seen & (behind >= 0)
    if window is not None:
        seen = seen & (behind.abs() < window)
    return torch.einsum("hij,jhd->ihd", s.masked_fill(~seen, -math.inf).softmax(-1), v)


def random_qkv(dtype=torch.float64, tokens=16):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, 6) for heads in (4, 2, 2, 4)]
    return [(2 * torch.randn(s, dtype=torch.float64, generator=generator)).to(dtype) for s in shapes]


def agree(found, q, k, v, dout, right, tolerance):
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = right(*exact)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, dout.double())]
    found = [found, *torch.autograd.grad(found, (q, k, v), dout)]
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * max(1.0, b.detach().abs().max().item())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("window", [None, 3, 16])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_value_and_gradients(name, bounds, window, dtype, tolerance):
    *leaves, dout = random_qkv(dtype)
    leaves = [x.requires_grad_() for x in leaves]
    ours = attention(*leaves, bounds, window, scores=SCORES[name])
    agree(ours, *leaves, dout, lambda *x: formula(*x, bounds, window, SCORES[name]), tolerance)


@pytest.mark.parametrize("lengths", [[130], [64, 1, 65, 3]], ids=str)
@pytest.mark.parametrize("name", SCORES)
def test_documents_on_each_side_of_a_tile_of_the_kernel(name, lengths):
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    *leaves, dout = random_qkv(tokens=bounds[-1])
    leaves = [x.requires_grad_() for x in leaves]
    for window in (None, 60):
        ours = attention(*leaves, bounds, window, scores=SCORES[name])
        agree(ours, *leaves, dout, lambda *x, w=window: formula(*x, bounds, w, SCORES[name]), 1e-12)


@pytest.mark.parametrize("window", [None, 3, 16])
@pytest.mark.parametrize("name", SCORES)
def test_tiles_of_sixteen_queries(name, window, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", {"cpu": 1})
    *leaves, dout = random_qkv(tokens=40)
    leaves = [x.requires_grad_() for x in leaves]
    runs = [tiles.Run(0, 1, 32), tiles.Run(32, 2, 4)]
    ours = tiles.tiled_attention(*leaves, runs, window, SCORES[name])
    agree(ours, *leaves, dout, lambda *x: formula(*x, [0, 32, 36, 40], window, SCORES[name]), 1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", [name for name, how in SCORES.items() if how.causal])
def test_over_a_cache(name, window):
    q, k, v, _ = random_qkv(tokens=11)
    whole = formula(q, k, v, [0, 11], window, SCORES[name])
    for new in (1, 4):
        found = cached_attention(q[-new:], k, v, window, SCORES[name])
        torch.testing.assert_close(found, whole[-new:], rtol=1e-12, atol=1e-12)
    keys, values = (x.new_zeros(2, 2, 16, 6) for x in (k, v))
    keys[1, :, :10], values[1, :, :10] = k[:10].transpose(0, 1), v[:10].transpose(0, 1)
    slots, positions = torch.tensor([1]), torch.tensor([10])
    found = decode_attention(q[10:], k[10:], v[10:], keys, values, slots, positions, window, SCORES[name])
    torch.testing.assert_close(found, whole[10:], rtol=1e-12, atol=1e-12)
