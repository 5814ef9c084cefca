"""Softmax cross entropy over a part of the vocabulary, in two passes: statistics, then the gradient in place.

Between the two the caller combines the statistics of the parts (tensor parallelism). Each row is read twice and written
once. On a GPU the two passes scale and cap the logits as they read them (LogitForm).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megalora.ops import extension, limits


class LogitForm(NamedTuple):
    """Logits are softcap * tanh(scale * s / softcap) of s; softcap None: scale * s."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, s: torch.Tensor) -> torch.Tensor:
        """Put the logits in place of s, and return them."""
        if self.scale != 1.0:
            s *= self.scale
        return s if self.softcap is None else s.div_(self.softcap).tanh_().mul_(self.softcap)

    def factors(self, logits: torch.Tensor) -> tuple[torch.Tensor | float, ...]:
        """Return what the gradient of `logits` is multiplied by to be that of s, one after another."""
        found: list[torch.Tensor | float] = []
        if self.softcap is not None:
            found.append(torch.addcmul(logits.new_ones(()), logits, logits, value=-1 / self.softcap**2))  # one pass
        return (*found, self.scale) if self.scale != 1.0 else tuple(found)


PLAIN = LogitForm()


def forms_in_kernels(s: torch.Tensor) -> bool:
    """Return whether `statistics_` and `gradient_` take a form of s [N, V]; elsewhere it is applied before."""
    return s.device.type == "cuda" and _compiled(s)


def statistics_(logits: torch.Tensor, label: torch.Tensor, form: LogitForm = PLAIN) -> torch.Tensor:
    """Return [3, N]: each row's maximum, its sum of exp(logit - maximum), and the logit of its label.

    logits  [N, V], this part of the vocabulary, or s, what `form` makes logits of (see forms_in_kernels); what stands
            there afterwards is for `gradient_` alone
    label   [N] int64, relative to the part: outside 0 .. V-1 it stands in another part, and its logit is given as 0
    In float32, or float64 where the logits are.
    """
    assert form == PLAIN or forms_in_kernels(logits)
    if _compiled(logits):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        stats = torch.empty(3, logits.shape[0], dtype=dtype, device=logits.device)
        torch.ops.megalora.cross_entropy_stats_(logits, label, stats, form.scale, form.softcap or 0.0)
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
    logits: torch.Tensor,
    label: torch.Tensor,
    local: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    form: LogitForm = PLAIN,
) -> torch.Tensor:
    """Put softmax - onehot(label) in place of the logits, after `statistics_`; of s, its gradient.

    local           [N] the maximum that `statistics_` gave for this part
    maximum, total  [N] of the whole vocabulary
    """
    if _compiled(logits):
        torch.ops.megalora.cross_entropy_grad_(logits, label, maximum, total, form.scale, form.softcap or 0.0)
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
