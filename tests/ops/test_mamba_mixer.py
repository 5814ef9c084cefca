"""The mixer of Mamba-2: as transformers computes it, in packed rows, going on, and with few heads at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import BambaConfig
from transformers.models.bamba import modeling_bamba as theirs
from variants import with_float64

from megalora.ops import mamba_mixer as op
from megalora.ops.delta_rule import Documents

BOUNDS = [0, 1, 70, 70, 200, 211]
SIZES = (op.Sizes(6, 2, 4, 5), op.Sizes(4, 1, 3, 8), op.Sizes(3, 3, 2, 4))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def weights_of(sizes: op.Sizes, normed: bool = True, **more) -> op.MambaWeights:
    """Weights in float64; decays of all strengths."""
    heads, inner = sizes.heads, sizes.widths[0]
    norm = 1 + 0.1 * numbers(inner) if normed else None
    return op.MambaWeights(
        0.5 * numbers(sizes.channels, 4), 0.1 * numbers(sizes.channels, seed=1), numbers(heads), numbers(heads, seed=1),
        numbers(heads, seed=2), norm, 1e-5, inner // sizes.groups, **more,
    )  # fmt: skip


def given(sizes: op.Sizes, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return numbers(BOUNDS[-1], sum(sizes.widths)).to(dtype)


def grad_of(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(out, y, numbers(*out.shape, seed=9).to(out.dtype))[0]


def reference(y: torch.Tensor, sizes: op.Sizes, weights: op.MambaWeights) -> torch.Tensor:
    """transformers' mixer without its linears, of each document."""
    config = BambaConfig(
        hidden_size=sizes.widths[0], mamba_expand=1, mamba_n_heads=sizes.heads, mamba_d_head=sizes.features,
        mamba_n_groups=sizes.groups, mamba_d_state=sizes.state, rms_norm_eps=weights.eps, num_hidden_layers=1,
        mamba_chunk_size=16,
    )  # fmt: skip
    mixer = theirs.BambaMixer(config, 0).double().eval()
    mixer.in_proj, mixer.out_proj = torch.nn.Identity(), torch.nn.Identity()
    named = {
        "conv1d.weight": weights.convolution.unsqueeze(1), "conv1d.bias": weights.convolution_bias,
        "A_log": weights.decay, "dt_bias": weights.bias, "D": weights.skip, "norm.weight": weights.norm,
    }  # fmt: skip
    assert named.keys() == dict(mixer.named_parameters()).keys()
    mixer.load_state_dict(named)
    parts = [y[None, a:b] for a, b in itertools.pairwise(BOUNDS) if a < b]
    return torch.cat([with_float64(theirs, mixer, part)[0] for part in parts])


@pytest.mark.parametrize("sizes", SIZES)
def test_the_numbers_of_transformers(sizes):
    y, weights = given(sizes).requires_grad_(), weights_of(sizes)
    ours = op.mamba_mixer(y, sizes, weights, Documents.of(BOUNDS))
    expected = reference(y, sizes, weights)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(grad_of(ours, y), grad_of(expected, y), rtol=0, atol=1e-9)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_few_heads_at_a_time(sizes, normed, monkeypatch):
    y, weights, documents = given(sizes).requires_grad_(), weights_of(sizes, normed), Documents.of(BOUNDS)
    whole = op.mamba_mixer(y, sizes, weights, documents)
    grad, kept = grad_of(whole, y), op.Kept.nothing(len(BOUNDS) - 1, sizes, weights, y)
    for most in (1, 2, 4):
        monkeypatch.setattr(op, "MOST_ROWS", most * len(y))
        assert len(op._slices(len(y), sizes, weights)) > 1 or most >= sizes.heads
        out = op.mamba_mixer(y, sizes, weights, documents)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(grad_of(out, y), grad, rtol=0, atol=1e-12)
        with torch.no_grad():
            out, left = op.continued_mamba_mixer(y, sizes, weights, BOUNDS, documents, kept)
        torch.testing.assert_close(out, whole.detach(), rtol=0, atol=1e-12)
    monkeypatch.undo()
    _, expected = op.continued_mamba_mixer(y.detach(), sizes, weights, BOUNDS, documents, kept)
    for one, wanted in zip(left, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_going_on_gives_the_numbers_of_whole_documents(sizes):
    """In parts of any lengths, then token by token."""
    y, weights = given(sizes), weights_of(sizes, gate_scale=0.7, step_scale=1.3)
    whole = op.mamba_mixer(y, sizes, weights, Documents.of(BOUNDS))
    spans = [(70, 200), (1, 70)]
    kept = op.Kept.nothing(2, sizes, weights, y)
    places = [start for start, _ in spans]
    for counts in ((3, 3), (65, 20), (0, 7), (1, 1)):
        parts = [(at, at + count) for at, count in zip(places, counts, strict=True)]
        bounds = list(itertools.accumulate((b - a for a, b in parts), initial=0))
        given_now = torch.cat([y[a:b] for a, b in parts]), sizes, weights, bounds, Documents.of(bounds)
        out, kept = op.continued_mamba_mixer(*given_now, kept)
        torch.testing.assert_close(out, torch.cat([whole[a:b] for a, b in parts]), rtol=0, atol=1e-12)
        places = [b for _, b in parts]
    slots = op.Kept(*(torch.stack([torch.full_like(one[0], torch.nan), one[1], one[0]]) for one in kept))
    for _ in range(3):
        out = op.mamba_mixer_step(y[places], sizes, weights, slots, torch.tensor([2, 1]))
        torch.testing.assert_close(out, whole[places], rtol=0, atol=1e-12)
        places = [at + 1 for at in places]


def test_sixteen_bits_are_near():
    """Of float64: the convolution's result and the end are rounded, and nothing else."""
    sizes = SIZES[0]
    exact = weights_of(sizes)
    low = op.MambaWeights(
        exact.convolution.bfloat16(), exact.convolution_bias.bfloat16(), exact.decay.float(), exact.bias.float(),
        exact.skip.float(), exact.norm.bfloat16(), exact.eps, exact.across,
    )  # fmt: skip
    same = op.MambaWeights(
        *(one.double() for one in (low.convolution, low.convolution_bias, low.decay, low.bias, low.skip, low.norm)),
        exact.eps, exact.across,
    )  # fmt: skip
    y, documents = given(sizes, torch.bfloat16).requires_grad_(), Documents.of(BOUNDS)
    wide = y.detach().double().requires_grad_()
    out, wanted = op.mamba_mixer(y, sizes, low, documents), op.mamba_mixer(wide, sizes, same, documents)
    assert (out.double() - wanted).norm() <= 2**-7 * wanted.norm()
    grad, wanted_grad = grad_of(out, y), grad_of(wanted, wide)
    assert (grad.double() - wanted_grad).norm() <= 2**-6 * wanted_grad.norm()


def test_a_group_of_several_ranks_is_normed_as_one():
    """Halves of the heads of one group, with the sums of both, are the whole: what sums adds up is told by `across`."""
    sizes, half = op.Sizes(4, 1, 3, 8), op.Sizes(2, 1, 3, 8)
    y, weights, documents = given(sizes).requires_grad_(), weights_of(sizes), Documents.of(BOUNDS)
    whole = op.mamba_mixer(y, sizes, weights, documents)
    z, x, b, c, dt = y.split(sizes.widths, -1)
    inner = [slice(0, 6), slice(6, 12)]
    own = [
        torch.cat([z[:, at], x[:, at], b, c, dt[:, at.start // 3 : at.stop // 3]], 1).detach().requires_grad_()
        for at in inner
    ]
    parts = []
    for at in inner:
        heads, states = slice(at.start // 3, at.stop // 3), slice(12, 28)
        parts.append(
            op.MambaWeights(
                torch.cat([weights.convolution[at], weights.convolution[states]]),
                torch.cat([weights.convolution_bias[at], weights.convolution_bias[states]]),
                weights.decay[heads], weights.bias[heads], weights.skip[heads], weights.norm[at], weights.eps, 12,
            )  # fmt: skip
        )
    squares = []
    for y_own, w in zip(own, parts, strict=True):  # as each rank would give them to the others
        op.mamba_mixer(y_own, half, w, documents, lambda x: squares.append(x.clone()) or x)
    total = sum(squares)
    for at, y_own, w in zip(inner, own, parts, strict=True):
        out = op.mamba_mixer(y_own, half, w, documents, lambda x: total.clone())
        torch.testing.assert_close(out, whole[:, at], rtol=0, atol=1e-12)
