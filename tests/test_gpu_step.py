"""Whole steps on a GPU against the float64 oracle on the CPU: same model, same rows, same dropout masks."""

from __future__ import annotations

import pytest
import torch
from oracle import FAMILIES, Run, train

pytestmark = pytest.mark.gpu

# Sizes that the kernels take: rows on 16 bytes, heads of 16 or more.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 264,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_step_on_the_gpu(family, dtype, tolerance):
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    run = Run(family=family, model=SIZES, lora=lora, steps=2, seq_length=64)
    wanted = train(0, 1, run)
    ours = train(0, 1, run.on(dtype=dtype, device="cuda"))
    for a, b in zip(ours.losses, wanted.losses, strict=True):
        assert abs(a - b) <= tolerance * b
    for name, (_, grad) in wanted.gradients.items():
        error = (ours.gradients[name][1].double().cpu() - grad).norm() / grad.norm()
        assert error <= 10 * tolerance, (name, error)
    again = train(0, 1, run.on(dtype=dtype, device="cuda"))
    assert again.losses == ours.losses
    assert all(torch.equal(p, ours.adapters[n][1]) for n, (_, p) in again.adapters.items())
