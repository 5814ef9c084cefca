"""NF4 as e4m3: values rounded with a scale a row, the same in every part; and the kernels, compiled for a CPU."""

import ctypes

import pytest
import torch
from cuda_on_cpu import compiled

from megalora.ops.fp8 import E4M3, LARGEST
from megalora.ops.nf4 import Absmax, Nf4Weight, quantise_nf4
from megalora.ops.nf4_fp8 import Nf4AsFp8Rows, row_scale, rows_as_fp8


def random(*shape: int) -> torch.Tensor:
    """Rows and blocks of many sizes."""
    generator = torch.Generator().manual_seed(3)
    sizes = 2 ** (2 * torch.randn(shape[0], 1, generator=generator))
    return torch.randn(shape, generator=generator) * sizes * torch.rand(1, shape[1], generator=generator)


def decoded(weight, rows=None, columns=None, dtype=torch.float64):
    rows, columns = rows or (0, weight.shape[0]), columns or (0, weight.shape[1])
    out = torch.empty(rows[1] - rows[0], columns[1] - columns[0], dtype=dtype)
    (part,) = rows_as_fp8(weight, [rows], columns) if isinstance(weight, Nf4Weight) else [weight]
    part.decode_(out)
    return out


def nf4_values(weight: Nf4Weight) -> torch.Tensor:
    (part,) = weight.rows([(0, weight.shape[0])], (0, weight.shape[1]))
    out = torch.empty(weight.shape, dtype=torch.float64)
    part.decode_(out)
    return out


def test_the_scale_of_a_row_is_the_least_power_of_two_that_holds_it():
    sizes = torch.tensor([448.0, 448.00003, 449.0, 1e-30, 3e30, 0.02, 1.0])
    scale = row_scale(sizes)
    assert (sizes <= scale * LARGEST).all() and (sizes > scale / 2 * LARGEST).all()
    assert torch.frexp(scale)[0].eq(0.5).all() and scale[0] == 1 and scale[1] == 2
    assert row_scale(torch.tensor([0.0, float("nan"), float("inf")])).isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(30, 128), (30, 80), (31, 77)], ids=["blocks fit rows", "not", "odd"])
def test_a_value_is_that_of_nf4_rounded_to_four_bits(shape):
    weight = quantise_nf4(random(*shape).bfloat16())
    values, found = nf4_values(weight), decoded(weight)
    assert not found.equal(values)
    (part,) = rows_as_fp8(weight, [(0, shape[0])], (0, shape[1]))
    smallest = part.scale.double() * 2**-10  # half of e4m3's smallest number
    assert ((found - values).abs() <= torch.maximum(values.abs() / 16, smallest)).all()
    assert found.equal(found.bfloat16().double())  # the same in 16 bits, so in every dtype


@pytest.mark.parametrize("shape", [(30, 128), (30, 80), (31, 77)], ids=["blocks fit rows", "not", "odd"])
def test_a_part_has_the_values_of_the_whole(shape):
    """Also where the largest value of a row lies in columns that the part does not have."""
    W = random(*shape)
    W[:, 5] *= 1e4
    weight = quantise_nf4(W.bfloat16())
    whole = decoded(weight)
    for rows in ((0, shape[0]), (0, 7), (3, 30)):
        for columns in ((0, shape[1]), (0, 64), (7, 70), (32, 33)):
            assert decoded(weight, rows, columns).equal(whole[slice(*rows), slice(*columns)])


def test_codes_are_written_as_they_lie_with_terms_behind_them_and_turned():
    (part,) = rows_as_fp8(quantise_nf4(random(48, 128)), [(5, 37)], (0, 96))
    terms = random(32, 16).to(E4M3)
    out, turned = torch.empty(32, 112).to(E4M3), torch.empty(96, 32).to(E4M3)
    part.e4m3_(out, terms)
    part.turned_(turned)
    values = torch.empty(32, 96)
    part.decode_(values)
    assert (out[:, :96].float() * part.scale).equal(values) and out[:, 96:].float().equal(terms.float())
    assert turned.float().t().equal(out[:, :96].float())


def test_zeros_stay_zeros_and_not_a_number_one():
    W = torch.zeros(8, 64)
    W[3, 2] = float("nan")
    values = decoded(Nf4Weight((8, 64), quantise_nf4(W).codes, Absmax(plain=W.abs().amax(1))))
    assert not values[:3].any() and values[3].isnan().all() and not values[4:].any()


# ---- the kernels


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("emulated"), "nf4_e4m3.cpp").run


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def run(kernel, part: Nf4AsFp8Rows, terms: torch.Tensor | None, turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the kernel writes, what the reference does), with some bytes beside each row."""
    rows, m = part.rows, part.rows.meaning
    width = 0 if terms is None else terms.shape[1]
    shape = (rows.columns, len(part.codes)) if turned else (len(part.codes), rows.columns + width)
    found, wanted = (torch.full((shape[0], shape[1] + 32), 7, dtype=torch.uint8) for _ in range(2))
    place = wanted[:, : shape[1]].view(E4M3)
    part.turned_(place) if turned else part.e4m3_(place, terms)
    first, blocks = rows.first // 64, rows.width // 64
    sizes = (ctypes.c_int64 * 7)(len(part.codes), rows.columns, width, first, blocks, 8, found.stride(0))
    tensors = rows.codes, rows.absmax, m.scale, m.numbers, m.offset, part.scale, terms, found
    kernel(*map(pointer, tensors), sizes, ctypes.c_bool(turned))
    return found, wanted


# Less than a block of threads and several, an end inside of them, columns of a weight; terms that end inside of what a
# block of 64 takes.
PARTS = [((0, 2), (0, 64)), ((7, 12), (0, 64)), ((3, 44), (0, 320)), ((16, 160), (64, 256))]


@pytest.mark.parametrize("plain", [False, True], ids=["quantised absmax", "plain absmax"])
@pytest.mark.parametrize("rows, columns", PARTS)
def test_the_kernel_writes_the_codes_of_the_reference(kernel, rows, columns, plain):
    weight = quantise_nf4(random(300, 320))
    if plain:
        blocks = torch.arange(len(weight.absmax.codes))
        weight = Nf4Weight(weight.shape, weight.codes, Absmax(plain=weight.absmax.at(blocks, weight.absmax.codes)))
    (part,) = rows_as_fp8(weight, [rows], columns)
    for width in (None, 16, 48):
        terms = None if width is None else random(len(part.codes), width).to(E4M3)
        found, wanted = run(kernel, part, terms, turned=False)
        assert found.equal(wanted) and wanted.unique().numel() > 20
    if len(part.codes) % 16 == 0:
        found, wanted = run(kernel, part, None, turned=True)
        assert found.equal(wanted)
