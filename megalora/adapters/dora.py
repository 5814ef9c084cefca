"""DoRA on one linear: y = m / ||W + s B A|| * (W x + s B A dropout(x)) + b, row by row.

Liu et al. 2024, arXiv:2402.09353.

m [out_features] is trained beside A and B, and begins as the norm, so that the adapter begins as nothing. For the
gradient the norm counts as a constant (section 4.3 of the paper, and peft). Dropout is of the branch alone; peft drops
the input of (m / norm - 1) W x as well, which is the same where lora_dropout is 0.
"""

from __future__ import annotations

import torch


def square_norms(W: torch.Tensor, A: torch.Tensor, sB: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """Return ||W + s B A||² of each row [out] in float32 (float64 where W is), without W + s B A itself.

    W [out, in], A [r, in], sB [out, r]; base [out]: ||W||² where it is known.
    It is ||W||² + 2 <W A^T, sB> + <sB (A A^T), sB>, each a sum over the columns, of some of them a part of it.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    if base is None:
        base = base_square_norms(W)
    if W.device.type == "cuda" and W.dtype != wide:
        across, gram = (torch.mm(x, A.t(), out_dtype=wide) for x in (W, A))
    else:
        across, A = (W @ A.t()).to(wide), A.to(wide)
        gram = A @ A.t()
    sB = sB.to(wide)
    # Few operations, since there are so many linears: a step of the 8B has 224.
    return torch.addmm(across, sB, gram, beta=2).mul_(sB).sum(1).add_(base)


def base_square_norms(W: torch.Tensor) -> torch.Tensor:
    """Return ||W||² of each row [out] in float32 (float64 where W is)."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32)).square()


def factors(magnitude: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return m / norm [out]; 0 for a row of zeros, whose product is 0 whatever it is multiplied by."""
    return torch.where(norms > 0, magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
