"""GEMMs against float64, whichever library does them, on every layout of operands that the layers use."""

import pytest
import torch

from megalora.ops import matmul as module
from megalora.ops.matmul import matmul, matmul_nt

# (M, K, N): by oneDNN where it is there, too small for it, and few rows
SIZES = pytest.mark.parametrize(
    "sizes", [(70, 96, 136), (256, 40, 65), (5, 6, 7), (0, 8, 8), (1, 577, 1024), (3, 40, 7), (4, 5, 9)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "rows with gaps": lambda x: torch.cat([x, x[:, :3]], 1)[:, : x.shape[1]],
    "columns with gaps": lambda x: torch.cat([x, x[:3]], 0).t().contiguous().t()[: x.shape[0]],
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02}


def randn(seed, *shape, dtype):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, wanted, dtype):
    assert found.dtype == dtype and found.is_contiguous()
    size = wanted.abs().max() if wanted.numel() else 1
    assert ((found.double() - wanted).abs() <= ROUNDING[dtype] * size).all()


@SIZES
@DTYPES
@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("layout_b", LAYOUTS)
def test_products(sizes, dtype, layout_a, layout_b):
    m, k, n = sizes
    a, b, bias = (randn(i, *shape, dtype=dtype) for i, shape in enumerate([(m, k), (n, k), (n,)]))
    wanted = a.double() @ b.double().t()
    a, b = LAYOUTS[layout_a](a), LAYOUTS[layout_b](b)
    close(matmul_nt(a, b), wanted, dtype)
    close(matmul_nt(a, b, bias), wanted + bias.double(), dtype)
    close(matmul(a, b.t()), wanted, dtype)


def test_float32_has_the_same_bits_on_any_number_of_threads():
    a, b, bias = (randn(i, *shape, dtype=torch.float32) for i, shape in enumerate([(130, 4000), (96, 4000), (96,)]))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append((matmul_nt(a, b, bias), matmul(b, a.t())))
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(x.equal(y) for x, y in zip(found, results[0], strict=True))


def test_without_onednn_torch_does_it(monkeypatch):
    a, b = randn(0, 64, 64, dtype=torch.float32), randn(1, 128, 64, dtype=torch.float32)
    monkeypatch.setattr(module, "_has_onednn", lambda: False)
    assert matmul_nt(a, b).equal(a @ b.t()) and matmul(a, b.t()).equal(a @ b.t())
