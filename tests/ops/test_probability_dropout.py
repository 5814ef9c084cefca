"""Dropout of probabilities: the masks are those of a head's site, with the key's token for the feature."""

import torch

from megalora.ops.attention import Scores, attention
from megalora.ops.dropout import Dropout, keep_mask
from megalora.ops.probability_dropout import draw_probabilities

DRAW = Dropout(p=0.3, seed=5, site=0, step=2)
SITES = torch.tensor([11, 12, 13, 14])


def test_masks_are_those_of_the_tokens():
    tokens = torch.cat([torch.arange(21, 30), torch.arange(1 << 33, (1 << 33) + 9)])
    keep = draw_probabilities(DRAW, SITES, tokens).keep(2, slice(3, 9), slice(2, 7))
    assert keep.shape == (2, 4, 6, 5)
    for c, document in enumerate(tokens.split(9)):
        for h, site in enumerate(SITES):
            spec = Dropout(DRAW.p, DRAW.seed, site, DRAW.step, feature_offset=int(document[2]))
            assert torch.equal(keep[c, h], keep_mask(document[3:9], 5, spec))


def test_attention_is_that_of_the_dropped_probabilities():
    generator = torch.Generator().manual_seed(0)
    bounds = (0, 7, 12)
    q, k, v, dout = (torch.randn(12, n, 6, dtype=torch.float64, generator=generator) for n in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    tokens = torch.arange(100, 112)
    dropout = draw_probabilities(DRAW, SITES, tokens)
    out = attention(q, k, v, bounds, None, None, Scores(scale=0.4), dropout)
    found = torch.autograd.grad(out, leaves, dout)
    parts = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        length = slice(start, stop)
        keep = dropout.of(length).keep(1, slice(0, stop - start), slice(0, stop - start))[0]
        scores = torch.einsum("nhd,mhd->hnm", q[length], k[length].repeat_interleave(2, 1)) * 0.4
        mask = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1) * keep * DRAW.scale
        parts.append(torch.einsum("hnm,mhd->nhd", p, v[length].repeat_interleave(2, 1)))
    wanted = torch.cat(parts)
    assert (out - wanted).abs().max() < 1e-13
    for a, b in zip(found, torch.autograd.grad(wanted, leaves, dout), strict=True):
        assert (a - b).abs().max() < 1e-12
