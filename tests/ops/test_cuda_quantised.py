"""The CUDA kernels of quantised weights against the torch references on the CPU."""

from dataclasses import replace

import pytest
import torch

from megalora.ops import extension, limits
from megalora.ops.fp8 import (
    E4M3,
    Fp8Rows,
    Fp8Weight,
    branch_terms_,
    product,
    quantise_factor,
    quantise_rows,
    quantise_with_branch,
    terms_for,
    turn,
)
from megalora.ops.nf4 import Absmax, multiplies, quantise_nf4
from megalora.ops.nf4 import product as nf4_product
from megalora.ops.nf4_fp8 import rows_as_fp8
from megalora.ops.rms_norm import rms_norm
from megalora.parallel.formats import BaseFormat
from megalora.parallel.split import Split

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_the_kernels():
    if not extension.has_kernels("cuda"):
        pytest.skip("megalora's CUDA kernels are not built: make install with a CUDA toolkit")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows, columns", [(300, 4096), (7, 48), (9, 6144), (33, 28672), (5, 57344)])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_are_quantised_as_the_reference_does_it(rows, columns, scaled):
    x = (randn(rows, columns + 64) * randn(rows, 1, seed=1)).bfloat16().cuda()[:, :columns]
    x[3] = 0
    factor = randn(columns, seed=2).abs().cuda() if scaled else None
    codes, scale = quantise_factor(x, factor)
    wanted, wanted_scale = quantise_rows(x, factor)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    # The kernel multiplies by the inverse of the scale: now and then another code, the next one. Of a row in bfloat16
    # whole groups of equal values lie halfway between two codes.
    assert (codes.view(torch.uint8) != wanted.view(torch.uint8)).float().mean() < 2e-3
    assert (codes.float() - wanted.float()).abs().max() <= 32


def test_not_a_number_stays_one():
    x = randn(4, 64).bfloat16().cuda()
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    codes, scale = quantise_factor(x)
    assert (codes.float() * scale).isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("rows, columns", [(4096, 4096), (48, 80), (16, 16), (80, 144)])
def test_codes_are_turned(rows, columns):
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).cuda()
    out = torch.zeros(columns + 64, rows, dtype=torch.uint8, device="cuda")
    turn(codes.view(E4M3), out[:columns].view(E4M3))
    assert out[:columns].equal(codes.t()) and not out[columns:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_gives_the_bits_of_the_reference(dtype):
    weight = quantise_nf4(randn(300, 512) * 0.02)
    for columns in ((0, 512), (128, 320)):
        width = columns[1] - columns[0]
        here, there = torch.empty(300, width, dtype=dtype), torch.empty(300, width + 64, dtype=dtype, device="cuda")
        weight.rows([(0, 300)], columns)[0].decode_(here)
        weight.to("cuda").rows([(0, 300)], columns)[0].decode_(there[:, :width])
        assert there[:, :width].cpu().equal(here)
    blocks = Fp8Weight(randn(300, 512).to(E4M3), torch.rand(38, 64), (8, 8))
    (part,) = blocks.rows([(3, 290)], (16, 512))
    here, there = torch.empty(287, 496, dtype=dtype), torch.empty(287, 496, dtype=dtype, device="cuda")
    part.decode_(here)
    Fp8Rows(part.codes.contiguous().cuda(), part.scale.contiguous().cuda(), part.block, part.phase).decode_(there)
    assert there.cpu().equal(here)


def sevens(*shape):
    return [torch.full(shape, 7, dtype=torch.uint8, device=device) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("rows, columns", [((0, 304), (0, 512)), ((3, 83), (128, 320)), ((16, 24), (0, 64))])
@pytest.mark.parametrize("plain", [False, True])
def test_nf4_becomes_the_codes_in_e4m3_of_the_reference(rows, columns, plain):
    """As they lie with terms behind them, turned, and as values, beside what is not theirs."""
    weight = quantise_nf4(randn(304, 512) * randn(304, 1, seed=1).exp())
    if plain:
        blocks = torch.arange(len(weight.absmax.codes))
        weight = replace(weight, absmax=Absmax(plain=weight.absmax.at(blocks, weight.absmax.codes)))
    (here,), (there,) = (rows_as_fp8(w, [rows], columns) for w in (weight, weight.to("cuda")))
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    assert there.has_kernel and there.scale.cpu().equal(here.scale)
    for terms in (0, 16, 48):
        behind = randn(height, terms, seed=2).to(E4M3) if terms else None
        wanted, found = sevens(height, width + terms + 16)
        here.e4m3_(wanted[:, : width + terms].view(E4M3), behind)
        there.e4m3_(found[:, : width + terms].view(E4M3), None if behind is None else behind.cuda())
        assert found.cpu().equal(wanted)
    wanted, found = sevens(width + 1, height + 16)
    here.turned_(wanted[:width, :height].view(E4M3))
    there.turned_(found[:width, :height].view(E4M3))
    assert found.cpu().equal(wanted)
    for dtype in (torch.bfloat16, torch.float32):
        values, there_values = torch.empty(height, width, dtype=dtype), torch.empty(height, width, dtype=dtype).cuda()
        here.decode_(values)
        there.decode_(there_values)
        assert there_values.cpu().equal(values)


@pytest.mark.parametrize("rank", [0, 48])
def test_a_matrix_of_nf4_has_the_products_of_its_values(rank):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU does not multiply e4m3 with a scale a row")
    base, scratch = BaseFormat("nf4_fp8"), []
    parts = [quantise_nf4((randn(rows, 512, seed=rows) * 0.02).cuda()) for rows in (256, 64, 80)]
    matrix = base.matrix(400, 512, 64 if rank else 0, torch.bfloat16, "cuda", rank=rank)
    first = 0
    for weight in parts:
        rows = slice(first, first + weight.shape[0])
        matrix.fill(rows, _Stored(weight), Split(weight.shape), False)
        first = rows.stop
    matrix.clear_branch()
    if rank:
        matrix.branch(slice(0, 400), slice(0, rank)).copy_((randn(400, rank, seed=3) * 0.05).bfloat16())
    matrix.branch_written()
    W = matrix.weight(slice(0, 400))
    P = torch.cat((W, matrix._branch), 1).double()
    for count, most in ((1, 4e-3), (limits.MOST_SKINNY_ROWS + 1, 0.04), (512, 0.04)):
        X = randn(count, P.shape[1], seed=4).bfloat16().cuda()
        dY, bias = randn(count, 400, seed=5).bfloat16().cuda(), randn(400, seed=6).bfloat16().cuda()
        y, wanted = matrix.multiply(X, bias).double(), X.double() @ P.t() + bias.double()
        assert (y - wanted).norm() < most * wanted.norm()
        dX, wanted = matrix.multiply_transposed(dY).double(), dY.double() @ P
        assert (dX - wanted).norm() < 0.04 * wanted.norm()
        scratch.append(base.scratch.take((1, 1), torch.uint8, "cuda").data_ptr())
    assert len(set(scratch)) == 1


class _Stored:
    """A weight that the files hold in NF4."""

    dtype = torch.bfloat16

    def __init__(self, weight):
        self._weight = weight

    def stored(self):
        return self._weight


def test_a_weight_is_quantised_alike_on_both_devices():
    W = randn(300, 512).bfloat16()
    here, there = quantise_nf4(W), quantise_nf4(W.cuda())
    assert there.codes.cpu().equal(here.codes) and there.absmax.codes.cpu().equal(here.absmax.codes)
    assert there.absmax.scale.cpu().equal(here.absmax.scale)
    wanted, scale = quantise_rows(W)
    codes, scale_there = quantise_rows(W.cuda())
    assert codes.cpu().view(torch.uint8).equal(wanted.view(torch.uint8)) and scale_there.cpu().equal(scale)


@pytest.mark.parametrize("rows", [1, 2, 3, limits.MOST_SKINNY_ROWS, 5, 37, 512])
def test_a_few_rows_and_many_have_the_product_of_the_decoded_weight(rows):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU does not multiply e4m3 with a scale a row")
    W, x, branch = randn(256, 128, seed=1).cuda(), randn(rows, 128 + 64).bfloat16().cuda(), randn(256, 64, seed=2)
    branch = branch.bfloat16().cuda()
    codes, scale = quantise_rows(W)
    wanted = x[:, :128].float() @ (codes.float() * scale).t()
    if rows <= limits.MOST_SKINNY_ROWS:
        y = torch.ops.megalora.fp8_skinny_linear(x, codes, scale.view(1, -1), branch, None, True)
        wanted, tolerance = wanted + x[:, 128:].float() @ branch.float().t(), 4e-3
    else:
        y, tolerance = product(quantise_factor(x[:, :128]), codes, scale.view(1, -1)), 4e-2
    assert (y.float() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("rank", [48, limits.LARGEST_FP8_BRANCH + 8])
def test_the_terms_of_a_branch_are_those_of_the_reference(rank):
    outputs, inputs, room = 600, 256, rank + 16
    _, scale = quantise_rows(randn(outputs, inputs) * 0.02)
    branch = (randn(outputs, rank, seed=1) * 0.01).bfloat16()
    branch[:, 5] = 0
    X = randn(37, inputs + room, seed=2).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        codes, factor = (
            torch.ones(outputs, inputs + terms_for(rank)).to(E4M3).to(device),
            torch.empty(rank, device=device),
        )
        wide = torch.zeros(outputs, room, dtype=torch.bfloat16, device=device)
        wide[:, :rank] = branch.to(device)
        branch_terms_(wide[:, :rank], scale[:, 0].contiguous().to(device), codes[:, inputs:], factor)
        found.append(
            (codes[:, inputs:].float().cpu(), factor.cpu(), *quantise_with_branch(X.to(device), inputs, rank, factor))
        )
    (terms, factor, codes, row), (terms_there, factor_there, codes_there, row_there) = found
    torch.testing.assert_close(factor_there, factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(row_there.cpu(), row, rtol=1e-6, atol=0)
    # Rounding of a factor may give the next code, and the next term makes up for it.
    sums = [t[:, :rank] + t[:, rank : 2 * rank] for t in (terms, terms_there)]
    torch.testing.assert_close(*sums, rtol=1e-3, atol=2e-3)
    assert (codes_there.cpu().float() != codes.float()).float().mean() < 1e-3
    assert not terms_there[:, 3 * rank :].any() and not codes_there[:, inputs + 3 * rank :].float().any()


def test_a_linear_without_adapters_takes_few_rows():
    """No column of a branch: a base alone generates. Columns that end inside what a warp takes at a time."""
    codes, scale = quantise_rows(randn(64, 5136).bfloat16().cuda())
    for rows in (1, 2, 4):
        x = randn(rows, 5136, seed=rows).bfloat16().cuda()
        y = torch.ops.megalora.fp8_skinny_linear(x, codes, scale.view(1, -1), x.new_empty(64, 0), None, False)
        wanted = x.float() @ (codes.float() * scale).t()
        assert (y.float() - wanted).norm() / wanted.norm() < 4e-3


def error_of(y, x, W, branch, bias):
    wanted = x.double() @ torch.cat((W, branch), 1).double().t() + bias.double()
    return ((y.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, limits.MOST_NF4_ROWS])
def test_a_few_rows_have_the_product_of_the_decoded_nf4(rows, dtype, most):
    """Parts of several weights, rows and columns of them, whole and with an end inside what a warp takes."""
    for runs, columns, room in (([(0, 300)], (0, 512), 64), ([(3, 40), (77, 300)], (128, 1216), 8)):
        weights = [quantise_nf4((randn(300, 1216, seed=seed) * 0.02).cuda()) for seed in (1, 2)]
        parts = [part for weight in weights for part in weight.rows(runs, columns)]
        W = torch.empty(sum(len(part.codes) for part in parts), columns[1] - columns[0], dtype=dtype, device="cuda")
        first = 0
        for part in parts:
            part.decode_(W[first : first + len(part.codes)])
            first += len(part.codes)
        x = randn(rows, W.shape[1] + room, seed=3).to(dtype).cuda()
        branch, bias = (randn(len(W), room, seed=4) * 0.02).to(dtype).cuda(), randn(len(W), seed=5).to(dtype).cuda()
        assert multiplies(parts)
        y = nf4_product(x, parts, branch, bias)
        assert error_of(y, x, W, branch, bias) < most
        assert error_of(nf4_product(x, parts, branch), x, W, branch, torch.zeros_like(bias)) < most


@pytest.mark.parametrize("rows", [1, limits.MOST_SKINNY_ROWS, 8, limits.MOST_NF4_ROWS])
def test_a_chain_of_few_rows_is_the_same_in_a_graph(rows):
    """Kernels of a decoding step start while the one before ends: each must wait for it."""
    if rows > limits.MOST_SKINNY_ROWS and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU does not multiply e4m3 with a scale a row")
    (part,) = quantise_nf4((randn(2048, 1024) * 0.03).cuda()).rows([(0, 2048)], (0, 1024))
    codes, scale = quantise_rows((randn(1024, 2048, seed=1) * 0.03).cuda())
    dense = (randn(1024, 1024, seed=2) * 0.03).bfloat16().cuda()
    nothing = torch.empty(2048, 0, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    x = randn(rows, 1024, seed=3).bfloat16().cuda()

    def chain(wait):
        y = x
        for _ in range(20):
            normed = rms_norm(y, weight, 1e-6)
            wait()
            wide = nf4_product(normed, [part], nothing)
            wait()
            if rows <= limits.MOST_SKINNY_ROWS:
                y = torch.ops.megalora.fp8_skinny_linear(wide, codes, scale.view(1, -1), nothing[:1024], None, True)
                wait()
                y = torch.ops.megalora.skinny_linear(y, dense, None)
            else:
                factor = quantise_factor(wide)
                wait()
                y = product(factor, codes, scale.view(1, -1))
            wait()
        return y

    wanted = chain(torch.cuda.synchronize)
    assert wanted.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(lambda: None)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert y.equal(wanted) and chain(lambda: None).equal(wanted)
