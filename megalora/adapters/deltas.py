"""LoRA branches as the low-rank matrices that they add to weights: sums, truncations, distances.

A branch is (A [r, in], sB [out, r]): it adds sB A [out, in]. All in float32 (float64 where the factors are). sB A
itself is never made, but a small matrix between two QR decompositions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Branch(NamedTuple):
    """A [r, in] and sB [out, r], of which s is `scaling`."""

    A: torch.Tensor
    sB: torch.Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def times(self, weight: float) -> Branch:
        """Return the branch that adds `weight` times as much."""
        return Branch(self.A, self.sB * weight, self.scaling * weight)


def side_by_side(branches: Sequence[Branch]) -> Branch:
    """Return the exact sum of branches: its rank is the sum of theirs."""
    return Branch(torch.cat([b.A for b in branches]), torch.cat([b.sB for b in branches], 1))


def linear_sum(branches: Sequence[Branch], weights: Sequence[float]) -> Branch:
    """Return the sums of sqrt(w s) A and of sqrt(w s) B, of one rank: peft's "linear", which is not the exact sum."""
    roots = [(weight * branch.scaling) ** 0.5 for weight, branch in zip(weights, branches, strict=True)]
    A = torch.stack([root * branch.A for root, branch in zip(roots, branches, strict=True)]).sum(0)
    B = torch.stack([root / branch.scaling * branch.sB for root, branch in zip(roots, branches, strict=True)]).sum(0)
    return Branch(A, B)


def truncated(branch: Branch, rank: int) -> tuple[Branch, float, float]:
    """Return (the nearest branch of that rank, norm of what is lost, norm of the whole); Frobenius norms."""
    left, right = torch.linalg.qr(branch.sB), torch.linalg.qr(branch.A.t())
    U, S, Vh = torch.linalg.svd(left.R @ right.R.t(), full_matrices=False)
    near = _from_svd(left.Q @ U, S, Vh @ right.Q.t(), rank)
    return near, S[rank:].norm().item(), S.norm().item()


def nearest(matrix: torch.Tensor, rank: int) -> tuple[Branch, float, float]:
    """Return (the nearest branch of that rank to `matrix` [out, in], norm of what is lost, norm of the whole)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return _from_svd(U, S, Vh, rank), S[rank:].norm().item(), S.norm().item()


def _from_svd(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, rank: int) -> Branch:
    roots = S[:rank].sqrt()
    return Branch(roots.unsqueeze(1) * Vh[:rank], U[:, :rank] * roots)


def norm(branch: Branch) -> float:
    """Return the Frobenius norm of sB A."""
    return torch.linalg.matrix_norm(torch.linalg.qr(branch.sB).R @ torch.linalg.qr(branch.A.t()).R.t()).item()


def principal(W: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, in], B [out, r] of PiSSA: s B A is W of its largest singular values (Meng et al. 2024)."""
    branch, _, _ = nearest(W, rank)
    return branch.A / scaling**0.5, branch.sB / scaling**0.5


def orthonormal(W: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, in], B [out, r] of OLoRA, the first columns and rows of W's QR decomposition (Buyukakyuz 2024)."""
    Q, R = torch.linalg.qr(W)
    return R[:rank].clone(), Q[:, :rank].clone()
