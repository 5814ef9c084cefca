"""Attention over the cache in Triton against attention over the whole, as tests/ops/test_decode_attention.py has it."""

import sys

import pytest
import torch
from interpreted import needs_triton, run_interpreted

from megalora.ops import decode_attention as op
from megalora.ops.attention import attention

SLOTS = 5
CASES = {  # (H, K, D), places that the cache has, places of the sequences, window, scale
    "gated": ((8, 2, 256), 70, (69, 0, 33), None, None),
    "window": ((3, 3, 40), 300, (299, 64, 17), 50, 0.3),
    "one key head": ((12, 1, 96), 200, (131, 128), None, None),
}


def check(name: str, dtype: torch.dtype, device: str, capacity: int | None = None) -> None:
    from megalora.ops.decode_attention_kernels import tiled_decode_attention

    (heads, key_heads, dim), length, places, window, scale = CASES[name]
    generator = torch.Generator().manual_seed(1)
    # What no sequence has written is not read, whatever it is.
    capacity = capacity or length
    keys, values = (torch.full((SLOTS, key_heads, capacity, dim), torch.nan, dtype=dtype) for _ in range(2))
    slots, new, wanted = torch.tensor([4, 0, 2])[: len(places)], [], []
    for slot, place in zip(slots.tolist(), places, strict=True):
        sizes = (heads, key_heads, key_heads)
        q, k, v = (torch.randn(place + 1, n, dim, generator=generator).to(dtype) for n in sizes)
        keys[slot, :, :place], values[slot, :, :place] = k[:-1].transpose(0, 1), v[:-1].transpose(0, 1)
        scores = op.PLAIN if scale is None else op.Scores(scale)
        wanted.append(attention(q.double(), k.double(), v.double(), [0, place + 1], window, None, scores)[-1])
        new.append(torch.cat([q[-1], k[-1], v[-1]]))
    wide = torch.stack(new).to(device)  # as the layers hand them over
    q, k, v = wide.split([heads, key_heads, key_heads], 1)
    keys, values, slots, positions = (x.to(device) for x in (keys, values, slots, torch.tensor(places)))
    before = keys.isnan()
    found = tiled_decode_attention(q, k, v, keys, values, slots, positions, window, scale or dim**-0.5)
    torch.testing.assert_close(found.double().cpu(), torch.stack(wanted), rtol=2e-2, atol=2e-2)
    assert keys[slots, :, positions].equal(k) and values[slots, :, positions].equal(v)
    keys[slots, :, positions] = torch.nan
    assert keys.isnan().equal(before)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(name):
    run_interpreted(__file__, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("capacity", [None, 9000])
def test_kernels(name, dtype, capacity):
    check(name, dtype, "cuda", capacity)


@pytest.mark.gpu
def test_a_model_takes_the_kernels(monkeypatch):
    """Nothing waits for the device: a CUDA graph can hold it."""
    q, k, v = torch.randn(2, 12, 256, device="cuda", dtype=torch.bfloat16).split([8, 2, 2], 1)
    cache, at = torch.zeros(3, 2, 9, 256, device="cuda", dtype=torch.bfloat16), torch.tensor([2, 0], device="cuda")
    op.decode_attention(q, k, v, cache, cache.clone(), at, at)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.decode_attention(q, k, v, cache, cache.clone(), at, at)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_which_heads_have_kernels(monkeypatch):
    monkeypatch.setattr(op.extension, "has_triton", lambda: True)
    monkeypatch.setattr(op.extension, "has_kernels", lambda device: False)
    assert op.has_kernel("cuda", torch.bfloat16, 4, 256) and op.has_kernel("cuda", torch.float16, 16, 96)
    for kind in (("cpu", torch.bfloat16, 4, 256), ("cuda", torch.float32, 4, 256), ("cuda", torch.bfloat16, 17, 256)):
        assert not op.has_kernel(*kind)
    assert not op.has_kernel("cuda", torch.bfloat16, 4, 512)
    monkeypatch.setattr(op.extension, "has_triton", lambda: False)
    assert not op.has_kernel("cuda", torch.bfloat16, 4, 256)


if __name__ == "__main__":
    check(sys.argv[1], torch.float32 if len(sys.argv) > 2 else torch.float16, "cpu")
