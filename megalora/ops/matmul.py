"""The GEMMs of frozen weights: on a CPU in float32 on AMX tiles or through oneDNN, everywhere else torch's own.

AMX multiplies bfloat16 alone, at 16 times the rate of AVX-512 in float32. Our kernel cuts each number into three parts
and takes the six products of parts that float32 can tell, so that errors are those of float32 at more than twice the
speed; of weights that are exact in bfloat16, as most files have them, it takes three (csrc/cpu/tile_linear.cpp).

On other CPUs: torch gives float32 GEMMs on x86 to MKL, which keeps to AVX2 on CPUs that are not Intel's; oneDNN asks
the CPU what it can do. With AVX-512 on AMD that is more than twice the speed. Neither's results depend on the number of
threads or on the run. Other dtypes have no such choice, or (bfloat16, float16) torch makes it by itself. A few rows at
a time (generation) have a kernel of our own.
"""

from __future__ import annotations

import functools
import math

import torch

from megalora.ops import extension, limits

# Multiplications below which looking a kernel up costs more than a better one gains (about 10 us).
_SMALLEST = 1 << 18
# Below so many rows, cutting a weight into parts costs what the tiles gain: each part is read but once.
_FEWEST_TILE_ROWS = 64


def matmul_nt(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a b^T + bias [M, N], for a [M, K], b [N, K], bias [N], of one dtype and any strides; in `out`, where it is
    given. Not for autograd.
    """
    if out is not None and a.device.type == "cuda":
        return torch.mm(a, b.t(), out=out) if bias is None else torch.addmm(bias, a, b.t(), out=out)
    result = _product(a, b, bias)
    return result if out is None else out.copy_(result)


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a b [M, N], for a [M, K], b [K, N]: as matmul_nt. Not for autograd."""
    return matmul_nt(a, b.t(), out=out)


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if _skinny(a, b):
        return torch.ops.megalora.skinny_linear(a, b, bias)
    if _by_tiles(a, b):
        return torch.ops.megalora.tile_linear(a, b, bias)
    if _better_by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return torch.nn.functional.linear(a, b, bias)


def _skinny(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether our kernel takes it (csrc/*/skinny_linear*): a few rows, where reading b is all there is to do."""
    if a.shape[0] > limits.MOST_SKINNY_ROWS or not a.stride(1) == b.stride(1) == 1:
        return False
    if not extension.has_kernels(a.device.type):
        return False
    if a.device.type == "cpu":
        return a.dtype in (torch.float32, torch.bfloat16)
    octets = (a.shape[1], a.stride(0), b.stride(0), a.data_ptr() // a.itemsize, b.data_ptr() // b.itemsize)
    return a.dtype in (torch.bfloat16, torch.float16) and all(n % limits.OCTET == 0 for n in octets)


def _by_tiles(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.shape[0] >= _FEWEST_TILE_ROWS
        and a.shape[0] * math.prod(b.shape) >= _SMALLEST
        and extension.has_tiles()
        and a.stride(1) == 1
        and (b.stride(1) == 1 or b.stride(0) == 1)
    )


@extension.constant_when_compiled
@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _better_by_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.shape[0] * math.prod(b.shape) >= _SMALLEST
        and _has_onednn()
        # With gaps between the rows of b it falls back to a kernel that is a thousand times slower.
        and (b.is_contiguous() or b.t().is_contiguous())
        and a.stride(1) == 1
    )
