"""Linear attention between its linears: in slices of heads, in parts of sequences, and against transformers."""

import itertools

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from megalora.ops import delta_mixer as op
from megalora.ops.delta_rule import CHUNK, Documents

HEADS, EPS = op.Heads(3, 2, 6, 4), 1e-6
BOUNDS = [0, 7, CHUNK + 9, 3 * CHUNK]


def weights(dtype: torch.dtype = torch.float64) -> op.DeltaWeights:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return op.DeltaWeights(random(HEADS.channels, 4), random(6), random(6), 1 + random(4) / 4, EPS)


def given(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BOUNDS[-1], sum(HEADS.widths), generator=generator, dtype=torch.float64).to(dtype)


def test_slices_of_heads_are_the_whole(monkeypatch):
    """A slice of one key head, or of two, gives the same result and gradient, which is that of plain autograd."""
    y, documents = given().requires_grad_(), Documents.of(BOUNDS)
    grad = torch.randn(BOUNDS[-1], 24, dtype=torch.float64)
    whole = op.delta_mixer(y, HEADS, weights(), documents)
    (expected,) = torch.autograd.grad(whole, y, grad)
    parts = y.split([HEADS.channels, *HEADS.widths[3:]], -1)
    (plain,) = torch.autograd.grad(op._mixed(parts, HEADS, weights(), documents), y, grad)
    assert (plain - expected).abs().max() < 1e-12 * plain.abs().max()
    for rows in (1, 2 * 2 * BOUNDS[-1]):
        monkeypatch.setattr(op, "MOST_ROWS", rows)
        out = op.delta_mixer(y, HEADS, weights(), documents)
        (found,) = torch.autograd.grad(out, y, grad)
        assert (out - whole).abs().max() < 1e-12 and (found - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize("cut", [1, 2, 5, CHUNK + 3])
def test_sequences_go_on_in_parts(cut):
    """Three sequences in two calls, the last token of each as a step of its own, are those in one."""
    y, own = given(), weights()
    whole = op.delta_mixer(y, HEADS, own, Documents.of(BOUNDS))
    spans = list(itertools.pairwise(BOUNDS))
    kept, found = op.Kept.nothing(3, HEADS, own, y), []
    cuts = [min(stop - 1, start + cut) for start, stop in spans]
    for parts in (
        [(start, end) for (start, _), end in zip(spans, cuts, strict=True)],
        [(end, stop - 1) for (_, stop), end in zip(spans, cuts, strict=True)],
    ):
        bounds = list(itertools.accumulate((b - a for a, b in parts), initial=0))
        new, documents = torch.cat([y[a:b] for a, b in parts]), Documents.of(bounds)
        out, kept = op.continued_delta_mixer(new, HEADS, own, bounds, documents, kept)
        found.append(list(zip(parts, out.split([b - a for a, b in parts]), strict=True)))
    last = [stop - 1 for _, stop in spans]
    slots = torch.tensor([4, 0, 3])
    cache = op.Kept(*(one.new_full((5, *one.shape[1:]), torch.nan) for one in kept))
    for all_slots, one in zip(cache, kept, strict=True):
        all_slots[slots] = one
    _, further = op.continued_delta_mixer(y[last], HEADS, own, [0, 1, 2, 3], Documents.of([0, 1, 2, 3]), kept)
    out = op.delta_mixer_step(y[last], HEADS, own, cache, slots)
    assert (out - whole[last]).abs().max() < 1e-12
    for all_slots, one in zip(cache, further, strict=True):
        assert (all_slots[slots] - one).abs().max() < 1e-12 and all_slots[[1, 2]].isnan().all()
    for (a, b), one in itertools.chain(*found):
        assert a == b or (one - whole[a:b]).abs().max() < 1e-12


def test_it_is_that_of_transformers():
    """Each document alone through transformers' layer whose linears are the identity."""
    config = Qwen3NextConfig(
        hidden_size=sum(HEADS.widths), num_hidden_layers=1, linear_num_key_heads=3, linear_num_value_heads=6,
        linear_key_head_dim=6, linear_value_head_dim=4, rms_norm_eps=EPS, layer_types=["linear_attention"],
    )  # fmt: skip
    layer, own = Qwen3NextGatedDeltaNet(config, 0), weights(torch.float32)
    z = slice(sum(HEADS.widths[:3]), sum(HEADS.widths[:4]))
    layer.in_proj_qkvz = layer.in_proj_ba = layer.out_proj = torch.nn.Identity()

    def ordered(mixed, _):
        parts = mixed.split(HEADS.widths, -1)
        shaped = [x.unflatten(-1, (-1, n)) for x, n in zip(parts[:4], (6, 6, 4, 4), strict=True)]
        return *shaped, *parts[4:]

    layer.fix_query_key_value_ordering = ordered
    with torch.no_grad():
        layer.conv1d.weight.copy_(own.convolution[:, None])
        layer.A_log.copy_(own.decay), layer.dt_bias.copy_(own.bias), layer.norm.weight.copy_(own.norm)
    y = given(torch.float32)
    ours = op.delta_mixer(y, HEADS, own, Documents.of(BOUNDS))
    with torch.no_grad():
        theirs = torch.cat([layer(y[None, a:b])[0] for a, b in itertools.pairwise(BOUNDS)])
    exact = op.delta_mixer(given(), HEADS, weights(), Documents.of(BOUNDS))
    assert (ours - exact).abs().max() < 3e-6 * exact.abs().max()
    assert (theirs - exact).abs().max() < 5e-5 * exact.abs().max()  # which subtracts sums of decays
    assert (y[:, z] != 0).all()


def test_bfloat16_keeps_states_in_float32():
    own = weights(torch.float32)
    kept = op.Kept.nothing(3, HEADS, own, given(torch.bfloat16))
    out, kept = op.continued_delta_mixer(given(torch.bfloat16), HEADS, own, BOUNDS, Documents.of(BOUNDS), kept)
    assert out.dtype == kept.channels.dtype == torch.bfloat16 and kept.states.dtype == torch.float32
    exact = op.delta_mixer(given(), HEADS, weights(), Documents.of(BOUNDS))
    assert (out.double() - exact).abs().max() < 0.03 * exact.abs().max()
