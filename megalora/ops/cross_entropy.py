"""Softmax cross entropy over a part of the vocabulary, in two passes: statistics, then the gradient in place.

Between the two the caller combines the statistics of the parts (tensor parallelism). Each row is read twice and written
once.
"""

from __future__ import annotations

import torch

from megalora.ops import extension, limits


def statistics_(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return [3, N]: each row's maximum, its sum of exp(logit - maximum), and the logit of its label.

    logits  [N, V], this part of the vocabulary; what stands there afterwards is for `gradient_` alone
    label   [N] int64, relative to the part: outside 0 .. V-1 it stands in another part, and its logit is given as 0
    In float32, or float64 where the logits are.
    """
    if _compiled(logits):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        stats = torch.empty(3, logits.shape[0], dtype=dtype, device=logits.device)
        torch.ops.megalora.cross_entropy_stats_(logits, label, stats)
        return stats
    place, mine = _place(logits, label)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    target = logits.gather(-1, place).squeeze(-1).to(dtype) * mine
    maximum = logits.amax(-1).to(dtype)
    # In place where that loses nothing: passes over memory are what this costs.
    exponentials = logits.to(dtype).sub_(maximum.unsqueeze(-1)).exp_()
    total = exponentials.sum(-1)
    if exponentials is not logits:
        logits.copy_(exponentials)
    return torch.stack([maximum, total, target])


def gradient_(
    logits: torch.Tensor, label: torch.Tensor, local: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """Put softmax - onehot(label) in place of the logits, after `statistics_`.

    local           [N] the maximum that `statistics_` gave for this part
    maximum, total  [N] of the whole vocabulary
    """
    if _compiled(logits):
        torch.ops.megalora.cross_entropy_grad_(logits, label, maximum, total)
        return logits
    place, mine = _place(logits, label)
    probabilities = logits.to(total.dtype).mul_(((local - maximum).exp() / total).unsqueeze(-1))
    probabilities.scatter_add_(-1, place, -mine.unsqueeze(-1).to(total.dtype))
    return probabilities if probabilities is logits else logits.copy_(probabilities)


def _place(logits: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mine = (label >= 0) & (label < logits.shape[1])
    return (label * mine).unsqueeze(-1), mine


def _compiled(logits: torch.Tensor) -> bool:
    """Return whether kernels take it: on a CPU not in float16; on a GPU not in float64, rows on 16 bytes."""
    if not extension.has_kernels(logits.device.type):
        return False
    if logits.device.type == "cpu":
        return logits.dtype != torch.float16
    return logits.dtype != torch.float64 and logits.stride(0) * logits.element_size() % limits.ALIGNMENT == 0
