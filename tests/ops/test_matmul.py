"""GEMMs against float64, whichever library does them, on every layout of operands that the layers use."""

import pytest
import torch

from megalora.ops import extension
from megalora.ops import matmul as module
from megalora.ops.matmul import matmul, matmul_nt

# (M, K, N): by tiles or oneDNN where they are there (the third in several blocks), too small for them, few rows
SIZES = pytest.mark.parametrize(
    "sizes",
    [(70, 96, 136), (256, 40, 65), (1100, 2101, 35), (5, 6, 7), (0, 8, 8), (1, 577, 1024), (3, 40, 7), (4, 5, 9)],
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


with_tiles = pytest.mark.skipif(not extension.has_tiles(), reason="this CPU has no AMX tiles")


@with_tiles
@pytest.mark.parametrize("exact", [24, 16, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_tiles_are_as_exact_as_float32(exact, turned):
    """Whichever parts of a weight are zero: its numbers have 24, 16 or 8 bits (those of bfloat16), some rows 24."""
    a, b = randn(0, 100, 200, dtype=torch.float32), randn(1, 300, 200, dtype=torch.float32)
    rounded = (b.view(torch.int32) & -(1 << 24 - exact)).view(torch.float32)
    b[:128, 32:64], b[:, 100:] = rounded[:128, 32:64], rounded[:, 100:]
    wanted = a.double() @ b.double().t()
    found = torch.ops.megalora.tile_linear(a, b.t().contiguous().t() if turned else b, None)
    # A product left out is off by 2^-17 of itself: a hundred times what is allowed here.
    assert (found - wanted).abs().max() <= 3e-7 * wanted.abs().max()
    one, unit = torch.full((64, 32), 1 + 2**-23), torch.full((64, 32), 1 / 32)  # each part counts
    assert torch.ops.megalora.tile_linear(one, unit, None).eq(1 + 2**-23).all()
    assert torch.ops.megalora.tile_linear(unit, one, None).eq(1 + 2**-23).all()


@with_tiles
def test_tiles_keep_what_is_not_finite():
    a, b = randn(0, 64, 64, dtype=torch.float32), randn(1, 128, 64, dtype=torch.float32)
    a[3, 5], b[7, 9] = float("inf"), float("nan")
    found = matmul_nt(a, b)
    assert not found[3].isfinite().any() and not found[:, 7].isfinite().any()
    assert found.isfinite().sum() == 63 * 127


@with_tiles
def test_tiles_beside_bfloat16():
    """torch's products of bfloat16 set up the tiles of a thread in their own way."""
    a, b = randn(0, 96, 96, dtype=torch.float32), randn(1, 96, 96, dtype=torch.float32)
    first, halves = matmul_nt(a, b), a.bfloat16() @ b.bfloat16()
    for _ in range(3):
        assert matmul_nt(a, b).equal(first) and (a.bfloat16() @ b.bfloat16()).equal(halves)


@with_tiles
def test_tiles_refuse_what_they_cannot_read():
    a, b = randn(0, 64, 64, dtype=torch.float32), randn(1, 64, 64, dtype=torch.float32)
    for x, weight, bias in [
        (a.double(), b.double(), None),
        (a.t(), b, None),
        (a, b[::2, ::2], None),
        (a[:, ::2], b[:, :32], None),
        (a, b, torch.zeros(3)),
    ]:
        with pytest.raises(RuntimeError, match="does not hold"):
            torch.ops.megalora.tile_linear(x, weight, bias)


def test_without_tiles_and_onednn_torch_does_it(monkeypatch):
    a, b = randn(0, 64, 64, dtype=torch.float32), randn(1, 128, 64, dtype=torch.float32)
    monkeypatch.setattr(module.extension, "has_tiles", lambda: False)
    monkeypatch.setattr(module, "_has_onednn", lambda: False)
    assert matmul_nt(a, b).equal(a @ b.t()) and matmul(a, b.t()).equal(a @ b.t())
