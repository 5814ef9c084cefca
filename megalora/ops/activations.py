"""Activations of plain MLPs, by HF's name (transformers.activations.ACT2FN)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

_gelu_tanh = functools.partial(functional.gelu, approximate="tanh")

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
    "silu": functional.silu,
}
