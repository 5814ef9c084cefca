"""Attention in steps over the cache is attention over the whole."""

import random
from types import SimpleNamespace

import pytest
import torch

from megalora.generation.cache import DecodeStep, KVCache, PrefillStep, Span
from megalora.ops.attention import attention
from megalora.ops.fp8_cache import decode_heads, encode_heads


def prefill(cache, spans):
    return PrefillStep.of(cache, spans, 8, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_steps_of_several_sequences(seed, fp8):
    """Any lengths, window and slots; the sequences go on by any number of tokens at a step, or rest."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
    window = rng.choice([None, rng.randint(1, 6)])
    most = rng.choice([1, 9])  # new tokens of a sequence at a step
    generator = torch.Generator().manual_seed(0)
    heads = {"q": 4, "k": 2, "v": 2}
    whole = {n: torch.randn(sum(lengths), h, 8, generator=generator).double() for n, h in heads.items()}
    bounds, given = [sum(lengths[:i]) for i in range(len(lengths) + 1)], dict(whole)
    expected = attention(whole["q"], whole["k"], whole["v"], bounds, window)

    cache = KVCache(len(lengths), max(lengths), fp8=fp8)
    if fp8:  # of what is kept, and the step that keeps it reads it so too
        whole |= {n: decode_heads(*encode_heads(whole[n]), torch.float64) for n in "kv"}
        exact, expected = expected, attention(whole["q"], whole["k"], whole["v"], bounds, window)
        assert 0 < (exact - expected).abs().max() < 0.5
    slots = rng.sample(range(len(lengths)), len(lengths))
    kept = [0] * len(lengths)
    found = torch.full_like(expected, torch.nan)
    while any(done < length for done, length in zip(kept, lengths, strict=True)):
        spans, rows = [], []
        for i, length in enumerate(lengths):
            new = rng.randint(0, min(most, length - kept[i]))
            if new:
                spans.append(Span(slots[i], kept[i], kept[i] + new))
                rows += range(bounds[i] + kept[i], bounds[i] + kept[i] + new)
                kept[i] += new
        if spans:
            step = prefill(cache, spans)
            if all(span.stop == span.start + 1 for span in spans) and rng.random() < 0.8:
                at, places = torch.tensor([[span.slot, span.start] for span in spans]).t()
                step = DecodeStep(cache, at, places)
            q, k, v = (given[name][rows] for name in "qkv")
            found[rows] = step.attend(3, q, k, v, window)
    torch.testing.assert_close(found, expected)


def test_layers_keep_apart():
    cache, x = KVCache(1, 2), torch.ones(1, 2, 4)
    step = prefill(cache, [Span(0, 0, 1)])
    step.attend(0, x, x, x, None)
    out = step.attend(1, x, x, 5 * x, None)
    assert torch.equal(out, 5 * x)
    assert cache.layer(0, x, x.clone())[1].whole.shape == (1, 2, 2, 4)
    assert cache.layer(0, x, x.clone())[1].whole[0, :, 0].equal(x[0])


def test_more_than_it_holds_is_a_bug():
    x = torch.ones(3, 2, 4)
    with pytest.raises(IndexError):
        prefill(KVCache(1, 2), [Span(0, 0, 3)]).attend(0, x, x, x, None)


def test_the_counters_suffice_for_the_widest_step_and_stay_where_they_are():
    """Recorded steps are filled up to a power of two, and go on counting where the first one did."""
    for slots in range(1, 40):
        cache = KVCache(slots + 1, 8, idle=slots)
        found = [
            cache.arrived(SimpleNamespace(is_cuda=True, device="cpu", shape=(1 << (count - 1).bit_length(), 3, 64)))
            for count in range(1, slots + 1)
        ]
        widest = 1 << (slots - 1).bit_length()
        assert found[0].numel() >= widest * 3 and not found[0].any()
        assert all(one is found[0] for one in found)
