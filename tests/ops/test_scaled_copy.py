"""Scaled copies on the CPU; the kernel is compared with this in tests/ops/test_cuda_ops.py."""

from __future__ import annotations

import torch

from megalora.ops.scaled_copy import scaled_copy_


def test_each_is_scaled_and_rounded_into_its_place():
    generator = torch.Generator().manual_seed(0)
    wide = torch.zeros(4, 9, dtype=torch.bfloat16)
    row, matrix = torch.randn(5, generator=generator), torch.randn(4, 3, generator=generator)
    out = torch.empty(5, dtype=torch.float64)
    scaled_copy_([(wide[:, 2:5], matrix, 0.3), (out, row, 1.0)])
    assert wide[:, 2:5].equal((matrix * 0.3).bfloat16()) and out.equal(row.double())
    assert not wide[:, :2].any() and not wide[:, 5:].any()
    scaled_copy_([])
