"""NF4 as bitsandbytes stores it: the numbers of the format, and parts of a weight that decode as the whole does."""

import hashlib

import pytest
import torch

from megalora.ops.nf4 import NUMBERS, Absmax, Nf4Weight, nested_numbers, packed, quantise_nf4, unpacked


def decoded(weight: Nf4Weight, rows=None, columns=None, dtype=torch.float64) -> torch.Tensor:
    rows, columns = rows or (0, weight.shape[0]), columns or (0, weight.shape[1])
    out = torch.empty(rows[1] - rows[0], columns[1] - columns[0], dtype=dtype)
    (part,) = weight.rows([rows], columns)
    part.decode_(out)
    return out


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02


def test_the_numbers_of_the_absmax_are_those_of_bitsandbytes():
    """Of create_dynamic_map(signed=True) of bitsandbytes 0.50."""
    numbers = nested_numbers()
    assert numbers.shape == (256,) and numbers.diff().gt(0).all()
    assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest() == (
        "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    )


def test_values_that_the_format_holds_come_back_as_they_were():
    """Each block of the 16 numbers four times, times an absmax that is the mean of all: its code is 0's."""
    numbers = torch.tensor(NUMBERS)
    W = (numbers.repeat(4) * 0.5).repeat(6, 2)
    weight = quantise_nf4(W)
    assert weight.absmax.offset == 0.5 and decoded(weight, dtype=torch.float32).equal(W)
    assert unpacked(weight.codes)[:16].tolist() == list(range(16)) and weight.codes[0] == 0x01


def test_each_value_is_the_nearest_of_sixteen():
    W = random(40, 128)
    blocks = W.view(-1, 64)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    nearest = (scaled.unsqueeze(-1) - torch.tensor(NUMBERS)).abs().argmin(-1)
    assert unpacked(quantise_nf4(W).codes).view(-1, 64).equal(nearest.to(torch.uint8))
    error = (decoded(quantise_nf4(W)) - W).norm() / W.norm()
    assert 0.08 < error < 0.1  # of normal values, the absmax quantised too


@pytest.mark.parametrize("shape", [(30, 128), (30, 80), (31, 77)], ids=["blocks fit rows", "not", "odd"])
def test_a_part_has_the_values_of_the_whole(shape):
    weight = quantise_nf4(random(*shape).bfloat16())
    whole = decoded(weight)
    for rows in ((0, shape[0]), (0, 7), (3, 30)):
        for columns in ((0, shape[1]), (0, 64), (7, 70), (32, 33)):
            assert decoded(weight, rows, columns).equal(whole[slice(*rows), slice(*columns)])


def test_absmax_that_are_not_quantised_are_taken_as_they_are():
    codes, absmax = torch.randint(0, 256, (96,), dtype=torch.uint8), torch.rand(3)
    found = decoded(Nf4Weight((3, 64), codes, Absmax(plain=absmax)), dtype=torch.float32)
    assert found.equal(torch.tensor(NUMBERS)[unpacked(codes).int()].view(3, 64) * absmax.unsqueeze(1))


def test_zeros_stay_zeros():
    assert not decoded(quantise_nf4(torch.zeros(4, 64))).any()


def test_two_indices_are_one_byte_with_the_first_in_the_high_half():
    assert packed(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist() == [0x12, 0xF0]
