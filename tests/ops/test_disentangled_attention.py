"""DeBERTa's attention in tiles: the numbers of the formula, forward and backward, however it is cut."""

import pytest
import torch

from megalora.models.blocks.disentangled import places_of, rows_of
from megalora.models.spec import Disentangled
from megalora.ops import disentangled_attention as op
from megalora.ops import tiled_attention
from megalora.ops.dropout import Dropout
from megalora.ops.probability_dropout import draw_probabilities
from megalora.ops.tiled_attention import Scores

BOUNDS = (0, 40, 80, 87, 88)  # two of one length, one of a few tokens, one of a single token
HEADS, DIM, SPAN, SCALE = 3, 4, 6, 0.3


def plain(q, k, v, keys, queries, rows, dropout):
    """The formula, document by document."""
    found = []
    for start, stop in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
        at = slice(start, stop)
        place = torch.arange(stop - start)
        row = rows[place[:, None] - place + len(rows) // 2].long()
        s = torch.einsum("nhd,mhd->hnm", q[at], k[at])
        s = s if keys is None else s + torch.einsum("nhd,nmhd->hnm", q[at], keys[row])
        s = s if queries is None else s + torch.einsum("mhd,nmhd->hnm", k[at], queries[row])
        p = (SCALE * s).softmax(-1)
        if dropout is not None:
            whole = slice(0, stop - start)
            p = torch.where(dropout.of(at).keep(1, whole, whole)[0], p * dropout.scale, 0.0)
        found.append(torch.einsum("hnm,mhd->nhd", p, v[at]))
    return torch.cat(found)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("terms", ["c2p, p2c", "c2p", "p2c"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_formula_forward_and_backward(p, terms, small, monkeypatch):
    if small:  # every document by itself, in tiles of 16 queries
        monkeypatch.setattr(op, "_AT_ONCE", {"cpu": 1})
        monkeypatch.setattr(tiled_attention, "_TILE", {"cpu": 1})
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, HEADS, DIM, dtype=torch.float64, generator=generator).requires_grad_()

    q, k, v = (draw(BOUNDS[-1]) for _ in range(3))
    keys, queries = (draw(2 * SPAN) if kind in terms else None for kind in ("c2p", "p2c"))
    positions = Disentangled("table", DIM, SPAN, None, None, furthest=20)
    tokens = torch.arange(BOUNDS[-1]) + 5
    draws = Dropout(p=p, seed=3, site=0, step=1) if p else None
    dropout = draw_probabilities(draws, torch.arange(HEADS), tokens)
    given = op.Positions(keys, queries, *places_of(positions, "cpu"))
    ours = op.disentangled_attention(q, k, v, given, BOUNDS, Scores(SCALE, causal=False), dropout)
    theirs = plain(q, k, v, keys, queries, rows_of(positions, 64), dropout)
    assert (ours - theirs).abs().max() < 1e-12
    of = [x for x in (q, k, v, keys, queries) if x is not None]
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for a, b in zip(*(torch.autograd.grad((one * weight).sum(), of) for one in (ours, theirs)), strict=True):
        assert b.abs().max() > 1e-3 and (a - b).abs().max() < 1e-12


@pytest.mark.parametrize(("span", "furthest"), [(6, 20), (7, 40), (256, 512), (5, None)])
def test_rows_of_distances_are_those_of_transformers(span, furthest):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    theirs = build_relative_position(torch.empty(1, 600, 1), torch.empty(1, 600, 1), span, furthest or -1)[0]
    theirs = (theirs + span).clamp(0, 2 * span - 1)
    rows = rows_of(Disentangled("table", 4, span, None, None, furthest=furthest), 1024)
    place = torch.arange(600)
    assert rows[place[:, None] - place + 1024].equal(theirs)


@pytest.mark.parametrize(("span", "furthest"), [(6, 20), (7, 40), (256, 512), (5, None)])
def test_places_say_what_rows_say_at_every_distance(span, furthest):
    spec = Disentangled("table", 4, span, None, None, furthest=furthest)
    rows, starts = places_of(spec, "cpu")
    distances = torch.arange(-3000, 3001)
    wanted = rows_of(spec, 3000)
    assert len(rows) < len(distances) and op.Positions(None, None, rows, starts).at(distances).equal(wanted)
    inside = (distances >= starts[:-1, None]) & (distances < starts[1:, None])
    assert inside.sum(0).eq(1).all() and inside.int().argmax(0).equal(wanted)
