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
    """The LoRA branch of one linear: rank, scaling (s of y += s z B^T), dropout probability.

    bias  y += s b, with b [out_features] trained (peft's lora_bias)
    dora  the result is decomposed into magnitude and direction (see megalora.adapters.dora)
    """

    r: int
    scaling: float
    dropout: float
    bias: bool = False
    dora: bool = False


def initial_factor(
    parameter: str, shape: tuple[int, ...], seed: int, init_lora_weights: bool | str, r: int
) -> torch.Tensor:
    """Return the whole initial matrix [shape] float32 of a lora_A or lora_B weight, from (seed, parameter name) alone.

    Drawn whole, with the global fan-in, so that no layout changes it; the caller slices. The distributions are PEFT's
    (peft/tuners/lora/layer.py, reset_lora_parameters and orthogonal_init).
    """
    is_b = parameter.endswith("lora_B.weight")
    if init_lora_weights == "orthogonal":
        return _orthogonal_factor(parameter, shape, seed, r)
    if is_b and init_lora_weights is not False:
        return torch.zeros(shape)
    generator = _generator(f"{seed}:{parameter}")
    if init_lora_weights == "gaussian":
        return torch.empty(shape).normal_(0.0, 1.0 / r, generator=generator)
    bound = 1.0 / math.sqrt(shape[1])  # kaiming_uniform_ with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _orthogonal_factor(parameter: str, shape: tuple[int, ...], seed: int, r: int) -> torch.Tensor:
    """Return lora_A or lora_B [shape] of a pair with B A = 0, neither of which is zero.

    The rows of an orthogonal matrix [r, r] are dealt to the two in turn, each behind a normal matrix over 10.
    """
    linear, _, factor = parameter.rpartition(".lora_")
    rows = torch.linalg.qr(torch.randn(r, r, generator=_generator(f"{seed}:{linear}.lora")))[0]
    normal = torch.randn(max(shape), r // 2, generator=_generator(f"{seed}:{parameter}"))
    if factor.startswith("A"):
        return (normal[: shape[1]] @ rows[0::2]).t().contiguous() / 10
    return normal[: shape[0]] @ rows[1::2] / 10


def _generator(name: str) -> torch.Generator:
    """Return a generator whose numbers depend on the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
