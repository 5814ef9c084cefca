"""Attention within documents against a softmax over an explicit mask."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import Plain

from megalora.ops import attention as module
from megalora.ops.attention import MOST_FEATURES, Packed, Scores, attention, cached_attention
from megalora.ops.merged_attention import merged_attention


def explicit(q, k, v, bounds, window, causal=True):
    """Every pair of tokens scored, then masked: same document, not ahead where causal, within the window."""
    tokens, heads = q.shape[:2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[2])
    place = torch.arange(tokens)
    document = torch.bucketize(place, torch.tensor(bounds[1:]), right=True)
    behind = place[:, None] - place
    seen = (document[:, None] == document) & (behind.abs() < (window or tokens))
    seen &= (behind >= 0) | (not causal)
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def random_qkv(tokens, heads=4, kv_heads=2, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim)]
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def agree(q, k, v, bounds, window, causal=True):
    dy = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours = attention(q, k, v, bounds, window, scores=Scores(causal=causal))
    theirs = explicit(q, k, v, bounds, window, causal)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(theirs, (q, k, v), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    window=st.one_of(st.none(), st.integers(1, 10)),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)]),
    causal=st.booleans(),
)
def test_documents_windows_and_heads(lengths, window, heads, causal):
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    agree(*random_qkv(bounds[-1], *heads), bounds, window, causal)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 16, 17])
@pytest.mark.parametrize("bounds", [[0, 16], [0, 4, 8, 12, 16], [0, 4, 8, 11, 15, 16], [0, 1, 2, 3, 16]])
def test_runs_of_equal_documents(bounds, window):
    agree(*random_qkv(16), bounds, window)


def test_a_document_does_not_hear_another():
    q, k, v = random_qkv(12)
    before = attention(q, k, v, [0, 5, 12])[5:]
    changed = [torch.cat((torch.full_like(x[:5], 9.0), x[5:])) for x in (q, k, v)]
    assert attention(*changed, [0, 5, 12])[5:].equal(before)


def test_a_window_of_one_gives_the_token_its_own_value():
    q, k, v = random_qkv(7, heads=2, kv_heads=2)
    torch.testing.assert_close(attention(q, k, v, [0, 7], window=1), v)


def test_inputs_that_are_views_of_one_tensor():
    packed = torch.randn(10, 8, 6, dtype=torch.float64)
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    torch.testing.assert_close(attention(q, k, v, [0, 10]), explicit(q, k, v, [0, 10], None))


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("new", [1, 2, 5, 11])
def test_cached_attention_is_the_end_of_the_whole(new, window):
    q, k, v = random_qkv(11)
    whole = attention(q, k, v, [0, 11], window)
    torch.testing.assert_close(cached_attention(q[-new:], k, v, window), whole[-new:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_many_new_tokens_over_a_cache_are_scored_a_few_at_a_time(monkeypatch, window):
    q, k, v = random_qkv(23)
    whole, masks = attention(q, k, v, [0, 23], window)[-17:], []
    sdpa = module.scaled_dot_product_attention

    def counted(q, k, v, **how):
        masks.append(q.shape[1] * q.shape[2] * k.shape[2])
        return sdpa(q, k, v, **how)

    monkeypatch.setattr(module, "_SCORED", 300)
    monkeypatch.setattr(module, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(cached_attention(q[-17:], k, v, window), whole, rtol=1e-12, atol=1e-12)
    assert len(masks) > 4 and max(masks) <= 300


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 100, 3000])
@pytest.mark.parametrize("new", [2, 300, 1024])
def test_cached_attention_on_a_gpu(new, window, dtype):
    q, k, v = (x.detach().to("cuda") for x in random_qkv(2048, heads=8, kv_heads=2, dim=64))
    whole = explicit(q.cpu(), k.cpu(), v.cpu(), [0, 2048], window)[-new:]
    found = cached_attention(*(x.to(dtype) for x in (q[-new:], k, v)), window)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.cpu().double(), whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("features", [MOST_FEATURES, MOST_FEATURES + 8])
def test_kernels_that_read_bounds_on_the_device_get_no_head_that_is_too_large(monkeypatch, features):
    """ALiBi and latents make heads larger than those that the bounds were packed for."""
    taken = []
    monkeypatch.setattr(module, "_flash", lambda q, *rest: taken.append(q) or torch.zeros_like(q))
    q, k, v = (x.detach().half() for x in random_qkv(9, dim=features))
    out = attention(q, k, v, [0, 4, 9], packed=Packed(torch.tensor([0, 4, 9]), 5))
    assert len(taken) == (features == MOST_FEATURES)
    if not taken:
        expected = explicit(q.double(), k.double(), v.double(), [0, 4, 9], None)
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


def test_long_documents_go_call_by_call(monkeypatch):
    """With a kernel of plain torch in place of cuDNN's."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(32, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    dout = torch.randn_like(q)

    def made() -> list[torch.Tensor]:
        out = attention(q, k, v, (0, 16, 32))
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    wanted, called = made(), []

    def merged(*arguments):
        called.append(arguments)
        return merged_attention(*arguments, kernel=Plain())

    monkeypatch.setattr(module, "_compiled", lambda q: False)
    monkeypatch.setattr(module, "LONG_DOCUMENT", 16)
    monkeypatch.setattr(module, "takes_pieces", lambda *_: True)
    monkeypatch.setattr(module, "merged_attention", merged)
    for found, right in zip(made(), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert called
