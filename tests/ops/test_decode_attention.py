"""One new token of each sequence over the cache: the kernel and its reference against attention over the whole."""

import pytest
import torch

from megalora.ops import extension
from megalora.ops.attention import attention
from megalora.ops.decode_attention import decode_attention

LENGTHS, SLOTS, CAPACITY = (1, 7, 40), (4, 0, 2), 41


def compiled(monkeypatch, wanted):
    if wanted and not extension.has_kernels("cpu"):
        pytest.skip("the compiled ops are not built")
    monkeypatch.setattr(extension, "has_kernels", lambda device: wanted)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (3, 3, 10), (6, 1, 64)])
def test_it_is_attention_over_the_whole(monkeypatch, kernel, dtype, window, heads, kv_heads, dim):
    compiled(monkeypatch, kernel)
    generator = torch.Generator().manual_seed(1)
    # What no sequence has written is not read, whatever it is.
    keys, values = (torch.full((5, kv_heads, CAPACITY, dim), torch.nan, dtype=dtype) for _ in range(2))
    q, k, v, expected = [], [], [], []
    for slot, length in zip(SLOTS, LENGTHS, strict=True):
        whole = [torch.randn(length, n, dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)]
        expected.append(attention(*(x.double() for x in whole), [0, length], window)[-1])
        for cache, x in zip((keys, values), whole[1:], strict=True):
            cache[slot, :, : length - 1] = x[:-1].transpose(0, 1)
        for new, x in zip((q, k, v), whole, strict=True):
            new.append(x[-1])
    wide = torch.stack([torch.cat(parts) for parts in zip(q, k, v, strict=True)])  # as the layers hand them over
    q, k, v = wide.split([heads, kv_heads, kv_heads], dim=1)
    before = keys.clone()
    slots, positions = torch.tensor(SLOTS), torch.tensor(LENGTHS) - 1
    found = decode_attention(q, k, v, keys, values, slots, positions, window)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=tolerance, atol=tolerance)
    assert found.dtype == dtype and keys[slots, :, positions].equal(k) and values[slots, :, positions].equal(v)
    keys[slots, :, positions] = torch.nan
    assert keys.isnan().equal(before.isnan())


def test_what_the_cache_does_not_have_is_a_bug():
    if not extension.has_kernels("cpu"):
        pytest.skip("the compiled ops are not built")
    x, cache = torch.ones(1, 2, 4), torch.zeros(1, 2, 3, 4)
    for slot, position in ((0, 3), (1, 0), (0, -1)):
        with pytest.raises(RuntimeError, match="slot|position"):
            decode_attention(x, x, x, cache, cache.clone(), torch.tensor([slot]), torch.tensor([position]))
