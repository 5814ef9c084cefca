"""Many small matrices scaled and rounded into their places at once: the adapters in the compute dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalora.ops import extension


def scaled_copy_(copies: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
    """Compute out = scale * source for each (out, source, scale): of one shape, [N, M] or [M]; rows of `out` of any
    stride.
    """
    if copies and all(_compiled(out, source) for out, source, _ in copies):
        outs, sources, scales = (list(column) for column in zip(*copies, strict=True))
        torch.ops.megalora.scaled_copy_(outs, sources, scales)
        return
    for out, source, scale in copies:
        out.copy_(source if scale == 1.0 else source * scale)


def _compiled(out: torch.Tensor, source: torch.Tensor) -> bool:
    """Return whether the kernel takes it: on a GPU, from float32 to float32 or 16-bit floats."""
    return (
        out.device.type == "cuda"
        and extension.has_kernels("cuda")
        and source.dtype == torch.float32
        and out.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and source.is_contiguous()
        and out.stride(-1) == 1
    )
