"""Heads, documents and numbers for linear attention between its linears, by kernels and in plain torch."""

from __future__ import annotations

import torch

from megalora.ops import delta_mixer as op
from megalora.ops import fused_delta as fused
from megalora.ops.delta_rule import CHUNK, Documents

EPS = 1e-6
NAMES = "q", "k", "v", "z", "b", "a"
# Of all documents: one token, whole chunks, a part of a chunk, one that is longer than the others together.
LAYOUTS = {
    "one": (0, 1024),
    "packed": (0, 1, 1 + 2 * CHUNK, 200, 200, 263, 1500, 1537),
    "short": tuple(range(0, 600, 7)),
}
# Qwen3.5's heads, those of a rank of eight, and others.
HEADS = {
    "9B": op.Heads(4, 2, 128, 128), "rank": op.Heads(1, 2, 128, 128), "27B": op.Heads(2, 3, 128, 128),
    "wide": op.Heads(1, 4, 16, 128), "odd": op.Heads(3, 1, 16, 128),
}  # fmt: skip


def drawn(heads: op.Heads, tokens: int, dtype: torch.dtype, device: str = "cpu"):
    """(y, weights, gradient of the result), whose numbers are of `dtype`; decays from weak to strong, by head."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = heads.groups * heads.repeats
    decay = torch.linspace(0, 2.8, values, dtype=torch.float64).float().to(device)  # A is log of 1 to 16
    bias = (random(values) - 3).float().to(device)
    convolution = (random(heads.channels, 4) / 2).to(dtype).to(device)
    weights = op.DeltaWeights(convolution, decay, bias, (1 + random(heads.value) / 4).to(dtype).to(device), EPS)
    y, grad = random(tokens, sum(heads.widths)), random(tokens, heads.widths[2])
    return y.to(dtype).to(device), weights, grad.to(dtype).to(device)


def widened(weights: op.DeltaWeights) -> op.DeltaWeights:
    tensors = (getattr(weights, name).double() for name in ("convolution", "decay", "bias", "norm"))
    return op.DeltaWeights(*tensors, weights.eps)


def results(mixer, y: torch.Tensor, grad: torch.Tensor, heads: op.Heads) -> dict[str, torch.Tensor]:
    """The result and the gradient of each part of y."""
    y = y.detach().requires_grad_()
    out = mixer(y)
    (found,) = torch.autograd.grad(out, y, grad)
    return {"out": out.detach()} | dict(zip(NAMES, found.split(heads.widths, -1), strict=True))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference, in units of that of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def by_kernels(y, weights, grad, heads: op.Heads, bounds, room: int = 0) -> dict[str, torch.Tensor]:
    """room  for how many documents there is some, as in a CUDA graph; 0: for these alone."""
    documents = Documents.of(bounds, y.device)
    documents = documents.alike(room) if room else documents
    return results(lambda y: fused.fused_delta_mixer(y, heads, weights, documents), y, grad, heads)


def in_torch(y, weights, grad, heads: op.Heads, bounds) -> dict[str, torch.Tensor]:
    documents = Documents.of(bounds, y.device)
    return results(lambda y: op._Mixer.apply(y, heads, weights, documents), y, grad, heads)
