"""The LoRA FLOP count against a count of the products themselves."""

import numpy as np
import pytest

from megalora.monitor import keys_seen, lora_flops_per_token


def test_products_of_a_tiny_model():
    """One linear [6, 4] with LoRA r=2, one head of 3 over a document of 5 tokens; each product is 2*m*n*k."""
    tokens = 5
    linear = 2 * (2 * tokens * 6 * 4)  # forward, gradient of the input
    lora = 3 * (2 * tokens * 2 * (4 + 6))  # those, and gradient of the weight
    pairs = tokens * (tokens + 1) // 2
    attention = 2 * (2 * pairs * 3) + 5 * (2 * pairs * 3)  # QK, PV; five products in backward
    per_token = lora_flops_per_token(
        frozen_matmul_parameters=24,
        lora_parameters=20,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=3,
        context=keys_seen([tokens]),
    )
    assert per_token * tokens == pytest.approx(linear + lora + attention)


def test_context():
    assert keys_seen([7]) == 4
    assert keys_seen([1, 1, 1]) == 1
    assert keys_seen([2, 4]) == (3 + 10) / 6
    assert keys_seen([]) == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, chunk", [(None, None), (3, None), (9, None), (None, 4), (None, 9)])
def test_context_against_a_mask(window, chunk, causal):
    pairs = 0
    for length in (1, 4, 9, 11):
        at = np.arange(length)
        behind = at[:, None] - at
        seen = np.ones_like(behind, bool) if window is None else np.abs(behind) < window
        seen &= True if chunk is None else at[:, None] // chunk == at // chunk
        pairs += (seen & (behind >= 0) if causal else seen).sum()
    assert keys_seen([1, 4, 9, 11], window, chunk, causal) == pairs / 25
