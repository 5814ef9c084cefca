"""Matrices in 8 and 4 bits behind the interface of a dense one."""

from unittest import mock

import pytest
import torch
from oracle import RandomWeight

from megalora.errors import UserError
from megalora.ops import extension, limits, nf4, nf4_fp8
from megalora.ops.fp8 import E4M3, Fp8Rows, quantise_fp8, terms_for
from megalora.ops.nf4 import NUMBERS, quantise_nf4, unpacked
from megalora.ops.nf4_fp8 import Nf4AsFp8Rows, rows_as_fp8
from megalora.parallel import e4m3, quantised
from megalora.parallel.formats import BaseFormat
from megalora.parallel.split import Split

OUT, IN, ROOM = 96, 80, 8
FORMATS = pytest.mark.parametrize("name", ["fp8", "nf4", "nf4_fp8"])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def filled(base: BaseFormat, W: torch.Tensor, split: Split, transposed: bool = False, source=None):
    rows, columns = split.local_shape[::-1] if transposed else split.local_shape
    matrix = base.matrix(rows, columns, ROOM, torch.float64, "cpu", rank=ROOM)
    matrix.fill(slice(0, rows), source or RandomWeight(W), split, transposed)
    matrix.clear_branch()
    return matrix


@FORMATS
def test_products_are_those_of_the_decoded_values_with_the_branch_behind_them(name):
    base = BaseFormat(name)
    W = random(OUT, IN)
    matrix, other = filled(base, W, Split((OUT, IN))), filled(base, 2 * W, Split((OUT, IN)))
    matrix.branch(slice(4, 20), slice(1, 4)).copy_(random(16, 3))
    P = torch.cat((matrix.weight(slice(0, OUT)), torch.zeros(OUT, ROOM)), 1)
    P[4:20, IN + 1 : IN + 4] = random(16, 3)
    X, dY, bias = random(5, IN + ROOM), random(5, OUT), random(OUT)
    for _ in range(2):  # the scratch is the other's in between
        torch.testing.assert_close(matrix.multiply(X, bias), X @ P.t() + bias)
        torch.testing.assert_close(matrix.multiply_transposed(dY), dY @ P)
        torch.testing.assert_close(matrix.multiply_transposed(dY, branch_only=True), dY @ P[:, IN:])
        out = torch.empty(5, OUT, dtype=torch.float64)
        assert matrix.multiply(X, out=out) is out
        torch.testing.assert_close(out, X @ P.t())
        other.multiply(X)
    assert 0.01 < (P[:, :IN] - W).norm() / W.norm() < 0.1
    assert matrix.nbytes < {"fp8": 1.3, "nf4": 0.8, "nf4_fp8": 0.8}[name] * OUT * IN + OUT * ROOM * 8


def held(part) -> list[torch.Tensor]:
    """All tensors of the rows of a matrix."""
    found = []
    for value in vars(part).values() if hasattr(part, "__dict__") else part:
        found += [value] if isinstance(value, torch.Tensor) else held(value) if hasattr(value, "__dict__") else []
    return found


@FORMATS
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_keeps_its_part_of_a_weight_alone(name, stored, dim):
    """A view of some rows would keep the whole weight in memory."""
    source, quantise = RandomWeight(random(OUT, IN)), quantise_fp8 if name == "fp8" else quantise_nf4
    if stored:
        source = mock.Mock(wraps=source, dtype=source.dtype)
        source.stored.side_effect = lambda: quantise(random(OUT, IN))
    split = Split((OUT, IN), dim, ((16, 1, 32, 0),))
    matrix = filled(BaseFormat(name), random(OUT, IN), split, source=source)
    tensors = [tensor for part in matrix._parts.values() for tensor in held(part) if tensor.dim() == 2]
    assert tensors
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, tuple(tensor.shape)


@pytest.mark.parametrize("name", ["dense", "fp8", "nf4", "nf4_fp8"])
def test_parts_of_one_factor_are_multiplied_with_what_is_decoded_once(name, monkeypatch):
    base, decoded = BaseFormat(name), []
    matrix = filled(base, random(OUT, IN), Split((OUT, IN)))
    matrix.branch(slice(4, 20), slice(1, 4)).copy_(random(16, 3))
    X, dY, bias = random(12, IN + ROOM), random(12, OUT), random(OUT)
    wanted, wanted_back = matrix.multiply(X, bias), matrix.multiply_transposed(dY)
    decode_ = type(matrix).decode_
    monkeypatch.setattr(type(matrix), "decode_", lambda self, out: (decoded.append(self), decode_(self, out)))
    for of, x, whole in (
        (matrix.multiplier(bias), X, wanted),
        (matrix.transposed_multiplier(), dY, wanted_back),
        (matrix.transposed_multiplier(branch_only=True), dY, wanted_back[:, IN:]),
    ):
        out = torch.empty_like(whole)
        parts = [of(x[:5]), of(x[5:9], out[5:9]), of(x[9:])]
        torch.testing.assert_close(torch.cat(parts), whole)
        assert out[5:9].equal(parts[1])
    assert len(decoded) == (0 if name == "dense" else 2)
    matrix.multiplier()(X)
    assert len(decoded) == (0 if name == "dense" else 3), "another product may have been in the scratch meanwhile"


@FORMATS
def test_a_part_has_the_values_of_the_whole_whichever_way_it_is_stored(name):
    base = BaseFormat(name)
    W = random(OUT, IN)
    D = filled(base, W, Split((OUT, IN))).weight(slice(0, OUT))
    for split, part in (
        (Split.range((OUT, IN), 0, 13, 50), D[13:50]),
        (Split.range((OUT, IN), 1, 13, 50), D[:, 13:50]),
        (Split((OUT, IN), 0, ((3, 2, 5, 20), (60, 1, 7, 0))), torch.cat((D[3:8], D[23:28], D[60:67]))),
    ):
        assert filled(base, W, split).weight(slice(0, len(part))).equal(part)
        turned = Split(split.global_shape[::-1], 1 - split.dim, split.pieces)
        assert filled(base, W.t().contiguous(), turned, transposed=True).weight(slice(0, len(part))).equal(part)


class Stored(RandomWeight):
    def stored(self):
        return quantise_nf4(self.whole)


def test_what_a_file_has_quantised_is_taken_as_it_is_and_the_rest_as_asked():
    """A checkpoint in which some linears are left in floating point."""
    W = random(OUT, IN)
    split = Split((OUT, IN))
    for source, as_stored, is_exact in (
        (RandomWeight(W), True, True),
        (RandomWeight(W), False, False),
        (Stored(W), True, False),
    ):
        found = filled(BaseFormat("nf4", as_stored=as_stored), W, split, source=source).weight(slice(0, OUT))
        assert found.equal(W) is is_exact


def test_quantised_weights_that_lie_transposed_are_refused():
    W = random(OUT, IN)
    with pytest.raises(UserError, match=r"stored as \[in, out\] \[96, 80\]"):
        filled(BaseFormat("nf4"), W, Split((OUT, IN)), transposed=True, source=Stored(W))


def test_memory_for_products_in_e4m3_is_there_only_where_all_rows_have_one_scale():
    """As on a GPU that multiplies e4m3, without the products."""

    def rows(count: int, blocks: int) -> Fp8Rows:
        return Fp8Rows(random(count, IN).to(E4M3), torch.rand(count, blocks), IN // blocks, 0)

    for parts in ((rows(32, 1), rows(64, 1)), (rows(32, 1), rows(64, 2)), (rows(32, 2), rows(64, 1))):
        matrix = BaseFormat("fp8").matrix(OUT, IN, 16, torch.bfloat16, "cpu", rank=16)
        matrix._multiplies = True
        matrix._put(0, parts[0])
        matrix._put(32, parts[1])
        expected = torch.empty(OUT, IN, dtype=torch.bfloat16)
        parts[0].decode_(expected[:32])
        parts[1].decode_(expected[32:])
        assert matrix.weight(slice(0, OUT)).equal(expected)
        in_place = all(part.scale.shape[1] == 1 for part in parts)
        assert (matrix._terms is not None) is in_place
        held = {part.codes.untyped_storage().data_ptr() for part in matrix._parts.values()}
        assert held == {matrix._terms.untyped_storage().data_ptr()} if in_place else len(held) == 2


def nf4_skinny(x, codes, absmax, scale, numbers, offset, nested_block, first, width, branch, bias):
    """What csrc/cuda/nf4_skinny.cu does, in plain torch: every part by its own numbers."""
    parts = []
    for i, bytes_of_rows in enumerate(codes):
        values = torch.tensor(NUMBERS)[unpacked(bytes_of_rows.reshape(-1)).int()].view(len(bytes_of_rows), -1, 64)
        rows, blocks = values.shape[:2]
        place = first[i] + torch.arange(rows).unsqueeze(1) * width[i] + torch.arange(blocks)
        largest = numbers[i][absmax[i].int()] * scale[i][place // nested_block[i]] + offset[i]
        parts.append((values * largest.unsqueeze(2)).view(rows, -1).to(x.dtype))
    y = x @ torch.cat((torch.cat(parts), branch), 1).t()
    return y if bias is None else y + bias


@pytest.fixture
def few_rows(monkeypatch):
    """The ops for few rows on a CPU, and of how many they were called."""
    if not extension.load():
        pytest.skip("no megalora._C: " + extension.REMEDY)
    calls = []

    def op(x, *arguments):
        calls.append(len(x))
        return nf4_skinny(x, *arguments)

    def fp8_op(x, codes, scale, branch, bias, kept):
        calls.append(len(x))
        y = x.float() @ torch.cat((codes.float() * scale.t(), branch.float()), 1).t()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    library = torch.library.Library("megalora", "IMPL")
    library.impl("nf4_skinny_linear", op, "CPU")
    library.impl("fp8_skinny_linear", fp8_op, "CPU")
    for module in (quantised, e4m3):
        monkeypatch.setattr(module, "few_rows", lambda X, most: len(X) <= most)
    yield calls
    library._destroy()


def test_few_rows_are_multiplied_with_codes_of_all_linears_in_their_order(few_rows):
    """A matrix of two linears, filled in any order, the second with rows from two places and a part of the columns."""
    base, columns = BaseFormat("nf4"), 128
    W = {"first": random(40, columns), "second": random(96, columns)}
    split = Split((96, columns), 0, ((3, 2, 5, 20), (60, 1, 7, 0)))
    matrix = base.matrix(57, columns, ROOM, torch.float64, "cpu", rank=ROOM)
    matrix.fill(slice(40, 57), RandomWeight(W["second"]), split, False)
    matrix.fill(slice(0, 40), RandomWeight(W["first"]), Split((40, columns)), False)
    matrix.branch(slice(0, 57), slice(0, ROOM)).copy_(random(57, ROOM))
    P = torch.cat((matrix.weight(slice(0, 57)), random(57, ROOM)), 1)
    X, bias = random(limits.MOST_NF4_ROWS, columns + ROOM), random(57)
    out = torch.empty(len(X), 57, dtype=torch.float64)
    torch.testing.assert_close(matrix.multiply(X, bias), X @ P.t() + bias, rtol=1e-6, atol=1e-6)
    assert matrix.multiply(X, out=out) is out and out.equal(matrix.multiply(X))
    assert few_rows == 3 * [len(X)]
    many = random(limits.MOST_NF4_ROWS + 1, columns + ROOM)
    torch.testing.assert_close(matrix.multiply(many), many @ P.t(), rtol=1e-6, atol=1e-6)
    assert len(few_rows) == 3


@pytest.fixture
def emulated(few_rows, monkeypatch):
    """Products in e4m3 as on a GPU that multiplies it, the kernels by their references; the rows of each product."""
    asked = []

    def product(quantised, codes, scale, bias, out):
        asked.append(len(quantised[0]))
        y = (quantised[0].float() @ codes.float().t()) * quantised[1].view(-1, 1) * scale
        y = (y if bias is None else y + bias.float()).bfloat16()
        return y if out is None else out.copy_(y)

    monkeypatch.setattr(e4m3.fp8, "product", product)
    monkeypatch.setattr(Nf4AsFp8Rows, "has_kernel", property(lambda self: self.rows.aligned))
    monkeypatch.setattr(nf4_fp8, "starts_aligned", lambda codes: False)  # so that the references stand in
    return asked


def multiplied_in_e4m3(rank):
    """A matrix as it is on a GPU that multiplies e4m3."""
    matrix = BaseFormat("fp8").matrix(OUT, IN, rank, torch.bfloat16, "cpu", rank=rank)
    matrix._multiplies = True
    matrix._put(0, quantise_fp8(random(OUT, IN)).rows([(0, OUT)], (0, IN))[0])
    matrix.branch(slice(0, OUT), slice(0, rank)).copy_(random(OUT, rank))
    matrix.branch_written()
    return matrix


def test_linears_that_are_decoded_where_others_are_multiplied_are_told():
    """As on a GPU that multiplies e4m3, whose matrices of other sizes are decoded."""
    matrices = []
    for name, could, multiplies in (("q_proj", True, False), ("o_proj", True, True), ("k_proj", False, False)):
        matrix = BaseFormat("nf4_fp8").matrix(24, 40, 0, torch.bfloat16, "cpu")
        matrix._could, matrix._multiplies = could, multiplies
        matrices.append((matrix, [f"model.layers.{layer}.self_attn.{name}" for layer in range(2)]))
    (line,) = e4m3.decoded_note(matrices)
    assert "decoded to bfloat16 before each product" in line and "them in fp8: q_proj (a size" in line
    assert e4m3.decoded_note(matrices[1:]) == ()


@pytest.mark.parametrize("rank", [0, 16])
def test_many_rows_are_quantised_some_at_a_time(emulated, monkeypatch, rank):
    """The same numbers, and codes of no more than so many bytes."""
    matrix = multiplied_in_e4m3(rank)
    X, dY, bias = random(50, IN + rank).bfloat16(), random(50, OUT).bfloat16(), random(OUT).bfloat16()
    y, dX = matrix.multiply(X, bias), matrix.multiply_transposed(dY)
    assert emulated == [50, 50]
    monkeypatch.setattr(e4m3.fp8, "_FEWEST_ROWS", 20)
    monkeypatch.setattr(e4m3.fp8, "MOST_CODES", 1)
    for out in (None, torch.empty(50, OUT, dtype=torch.bfloat16)):
        assert matrix.multiply(X, bias, out).equal(y)
    assert matrix.multiply_transposed(dY).equal(dX)
    assert emulated[2:] == 3 * [20, 20, 10]


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows of two places", "some columns"])
def test_nf4_is_multiplied_in_e4m3_by_the_values_that_it_decodes_to(few_rows, emulated, rank, dim):
    """Forward and backward, of few rows and of many, the branch among them; the scratch is another's in between."""
    W = random(96, 192)
    W[:, 100] *= 50 if dim else 1  # the scale is that of the whole row
    split = Split((96, 192), 0, ((3, 1, 16, 0), (48, 1, 32, 0))) if dim == 0 else Split.range((96, 192), 1, 0, 64)
    rows, columns = split.local_shape
    base = BaseFormat("nf4_fp8")
    matrix, other = (base.matrix(rows, columns, rank, torch.bfloat16, "cpu", rank=rank) for _ in range(2))
    for one, whole in ((matrix, W), (other, 2 * W)):
        one._multiplies = True
        one.fill(slice(0, rows), RandomWeight(whole), split, False)
    assert base.scratch_bytes == rows * (columns + max(rank, terms_for(rank))) and matrix._terms is not None
    matrix.branch(slice(0, rows), slice(0, rank)).copy_(random(rows, rank))
    matrix.branch_written()
    P = torch.cat((matrix.weight(slice(0, rows)), matrix._branch), 1).float()
    assert P[:, :columns].equal(filled(BaseFormat("nf4_fp8"), W, split).weight(slice(0, rows)).float())
    bias = random(rows).bfloat16()
    for count in (1, limits.MOST_SKINNY_ROWS + 1, 40):
        X, dY = random(count, columns + rank).bfloat16(), random(count, rows).bfloat16()
        few, calls = count <= limits.MOST_SKINNY_ROWS, len(emulated)
        for y, wanted, most in (
            (matrix.multiply(X, bias), X.float() @ P.t() + bias.float(), 4e-3 if few else 0.05),
            (other.multiply(X), None, 0),
            (matrix.multiply_transposed(dY), dY.float() @ P, 0.05),
        ):
            assert wanted is None or (y.float() - wanted).norm() < most * wanted.norm()
        assert len(emulated) == calls + (1 if few else 3)
        branch_only = matrix.multiply_transposed(dY, branch_only=True).float()
        torch.testing.assert_close(branch_only, dY.float() @ P[:, columns:], rtol=2e-2, atol=1e-2)
    forward, backward = matrix.multiplier(bias), matrix.transposed_multiplier()
    assert torch.cat((forward(X[:7]), forward(X[7:]))).equal(matrix.multiply(X, bias))
    assert torch.cat((backward(dY[:7]), backward(dY[7:]))).equal(matrix.multiply_transposed(dY))


def test_rows_of_nf4_that_the_kernel_does_not_take_are_decoded(emulated):
    """The first linear fits, and the second, whose rows end inside a block, does not: none is multiplied in e4m3."""
    matrix = BaseFormat("nf4_fp8").matrix(32, 64, 16, torch.bfloat16, "cpu", rank=16)
    matrix._multiplies = True
    whole = torch.empty(32, 64, dtype=torch.bfloat16)
    for first, width, fits in ((0, 128, True), (16, 96, False)):
        (part,) = rows_as_fp8(quantise_nf4(random(16, width)), [(0, 16)], (0, 64))
        part.decode_(whole[first : first + 16])
        matrix._put(first, part)
        assert part.has_kernel is fits and (matrix._terms is not None) is fits
    matrix.clear_branch()
    matrix.branch_written()
    X = random(40, 80).bfloat16()
    torch.testing.assert_close(matrix.multiply(X), X[:, :64] @ whole.t())
    assert emulated == [] and matrix.weight(slice(0, 32)).equal(whole)


def test_a_gpu_without_products_in_e4m3_refuses_nf4_fp8(monkeypatch):
    from megalora.parallel import formats

    for capability, dtype, told in (
        ((8, 0), torch.bfloat16, "A100, compute capability 8.0"),
        ((9, 0), torch.float16, "dtype is float16"),
    ):
        monkeypatch.setattr(formats.fp8, "multiplies", lambda index, capability=capability: capability >= (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
        with pytest.raises(UserError, match=told):
            BaseFormat("nf4_fp8").matrix(32, 64, 0, dtype, "cuda")


@pytest.mark.parametrize("rank", [0, 16])
def test_of_up_to_four_rows_products_in_e4m3_keep_the_other_factor_in_16_bits(few_rows, emulated, rank):
    """More are quantised as in training: as on a GPU that multiplies e4m3, its product emulated."""
    matrix = multiplied_in_e4m3(rank)
    P, bias = torch.cat((matrix.weight(slice(0, OUT)), matrix._branch), 1).float(), random(OUT).bfloat16()
    for rows in (1, limits.MOST_SKINNY_ROWS, limits.MOST_SKINNY_ROWS + 1, limits.MOST_NF4_ROWS):
        X = random(rows, IN + rank).bfloat16()
        few, calls = rows <= limits.MOST_SKINNY_ROWS, (len(few_rows), len(emulated))
        y, wanted = matrix.multiply(X, bias).float(), X.float() @ P.t() + bias.float()
        error = (y - wanted).norm() / wanted.norm()
        assert error < 4e-3 if few else 0.01 < error < 0.05
        assert (len(few_rows), len(emulated)) == (calls[0] + few, calls[1] + (not few))
        out = torch.empty(rows, OUT, dtype=torch.bfloat16)
        assert matrix.multiply(X, bias, out) is out and out.float().equal(y)


def test_rows_of_other_forms_are_decoded(few_rows):
    """Rows that end inside a block, absmax that are not quantised, more parts than the kernel takes."""
    W = random(32, 128)
    uneven = filled(BaseFormat("nf4"), random(32, 80), Split((32, 80)))
    cut = filled(BaseFormat("nf4"), W, Split.range((32, 128), 1, 0, 96))
    runs = tuple((2 * i, 1, 1, 0) for i in range(limits.MOST_NF4_PARTS + 1))
    many = filled(BaseFormat("nf4"), W, Split((32, 128), 0, runs))
    for matrix in (uneven, cut, many):
        X = random(3, matrix.columns + ROOM)
        wanted = X[:, : matrix.columns] @ matrix.weight(slice(0, matrix.rows)).t()
        torch.testing.assert_close(matrix.multiply(X), wanted)
    (part,) = quantise_nf4(W).rows([(0, 32)], (0, 128))
    plain = nf4.replace(part, meaning=nf4.Absmax(plain=part.meaning.at(torch.arange(64).view(32, 2), part.absmax)[:0]))
    assert nf4.multiplies([part]) and not nf4.multiplies([plain]) and not nf4.multiplies([])
    assert few_rows == []
