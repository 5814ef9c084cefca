"""Keys and values in 8 bits: e4m3 codes with a scale for each head, token and block of 128 features.

A value x is kept as code * scale, where scale is the block's largest magnitude over e4m3's largest number: it is off by
at most |x| / 16, or by scale / 1024 where that is more (e4m3 has 3 bits of mantissa, and no numbers between 0 and
1 / 512). A block of zeros has the scale 0, and one that is not finite gives what is not finite again.
"""

from __future__ import annotations

import torch

from megalora.ops.fp8 import E4M3, LARGEST

BLOCK = 128


def scales_of(features: int) -> int:
    """Return how many scales a head of so many features has."""
    return -(-features // BLOCK)


def encode_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes [..., D] uint8, the bits of e4m3; scales [..., ceil(D / 128)] float32) of x [..., D]."""
    features, blocks = x.shape[-1], scales_of(x.shape[-1])
    wide = torch.nn.functional.pad(x.float(), (0, blocks * BLOCK - features)).unflatten(-1, (blocks, BLOCK))
    scales = wide.abs().amax(-1) / LARGEST
    codes = (wide / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    return codes.to(E4M3).view(torch.uint8).flatten(-2)[..., :features], scales


def decode_heads(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values [..., D] of codes [..., D] and scales [..., ceil(D / 128)], rounded once to `dtype`."""
    values = codes.contiguous().view(E4M3).float()
    if scales.shape[-1] == 1:
        return values.mul_(scales).to(dtype)
    return values.mul_(scales.repeat_interleave(BLOCK, -1)[..., : values.shape[-1]]).to(dtype)
