"""LoRA on one linear: y += s dropout(x) A^T B^T, with A [r, in_features] and B [out_features, r] (Hu et al. 2021).

The parallel linears hold and apply the factors; what the kind itself decides is here: shapes, initial values, and what
merging adds to the weight.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Adapter:
    """The LoRA branch of one linear: rank, scaling (s of y += s z B^T), dropout probability."""

    r: int
    scaling: float
    dropout: float


def initial_factor(
    parameter: str, shape: tuple[int, ...], seed: int, init_lora_weights: bool | str, r: int
) -> torch.Tensor:
    """The whole initial matrix [shape] float32 of a lora_A or lora_B weight, from (seed, parameter name) alone.

    Drawn whole, with the global fan-in, so that no layout changes it; the caller slices. The distributions are PEFT's
    (peft/tuners/lora/layer.py, reset_lora_parameters).
    """
    is_b = parameter.endswith("lora_B.weight")
    if is_b and init_lora_weights is not False:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{parameter}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if init_lora_weights == "gaussian":
        return torch.empty(shape).normal_(0.0, 1.0 / r, generator=generator)
    bound = 1.0 / math.sqrt(shape[1])  # kaiming_uniform_ with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
