"""ALiBi as more features, against the bias itself added to the scores."""

import pytest
import torch

from megalora.models.parts import alibi
from megalora.ops.alibi import EXTRA, with_bias, with_rounded_bias

T, H, D = 300, 6, 16


def inputs(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(T, H, D, generator=generator).to(dtype) for _ in range(3))
    positions = torch.arange(T) + 1000  # of the end of a long document
    return q, k, v, torch.tensor(alibi(H).slopes, dtype=torch.float64), positions


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("thd,shd->hts", q.double(), k.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_features_are_the_bias(dtype):
    q, k, v, slopes, positions = inputs(dtype)
    scale = D**-0.5
    wide_q, wide_k, wide_v = with_bias(q, k, v, slopes, positions, scale)
    bias = slopes[:, None, None] * positions
    difference = scores(wide_q, wide_k) * scale - (scores(q, k) * scale + bias)
    # Three terms of eleven (eight) bits each; slopes near the least number of float16 have fewer.
    assert difference.abs().max() < {torch.float64: 1e-11, torch.float16: 5e-2}.get(dtype, 1e-4)
    assert wide_v.shape == (T, H, D + EXTRA) and not wide_v[..., D:].any() and torch.equal(wide_v[..., :D], v)


def test_falcons_bias_is_rounded_and_scaled():
    q, k, v, slopes, positions = inputs(torch.float64)
    wide_q, wide_k, _ = with_rounded_bias(q, k, v, slopes, positions)
    bias = (slopes.bfloat16()[:, None] * positions).double()
    assert (scores(wide_q, wide_k) - (scores(q, k) + bias[:, None])).abs().max() < 1e-12


def test_slopes_of_any_number_of_heads_are_transformers():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 2, 6, 8, 12, 71):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64).view(heads, 2)[:, 1]
        assert torch.allclose(torch.tensor(alibi(heads).slopes, dtype=torch.float64), theirs, rtol=1e-6)
