"""Keys and values in e4m3: how far off they are, and what they take."""

import pytest
import torch

from megalora.ops.fp8_cache import BLOCK, decode_heads, encode_heads, scales_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [6, 64, BLOCK, BLOCK + 1, 576])
def test_a_value_is_as_near_as_three_bits_of_mantissa(features, dtype):
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(37, 3, features, generator=generator, dtype=torch.float64)
    x = (x * torch.logspace(-4, 2, features, dtype=torch.float64)).to(dtype)  # small ones beside large ones
    codes, scales = encode_heads(x)
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and scales.shape[-1] == scales_of(features)
    found = decode_heads(codes, scales, dtype)
    assert found.dtype == dtype
    each = scales.double().repeat_interleave(BLOCK, -1)[..., :features]
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    rounded = (x.double().abs() + least) * eps  # of the result in its own dtype
    bound = torch.maximum(x.double().abs() / 16, each / 1024) + rounded
    assert ((found.double() - x.double()).abs() <= bound * (1 + 1e-6)).all()
    assert (found.double() - x.double()).abs().max() > 0


def test_heads_tokens_and_blocks_have_scales_of_their_own():
    x = torch.ones(2, 2, 2 * BLOCK)
    x[0, 0, :BLOCK], x[1, 1, BLOCK:] = 1e-6, 1e6
    assert decode_heads(*encode_heads(x), torch.float32).allclose(x, rtol=1e-6)


def test_zeros_and_what_is_not_finite():
    x = torch.zeros(3, 1, 8)
    x[1, 0, 2], x[2, 0, 3] = torch.nan, torch.inf
    found = decode_heads(*encode_heads(x), torch.float32)
    assert found[0].equal(x[0]), "zeros stay"
    assert not found[1].isfinite().all() and not found[2].isfinite().all()
