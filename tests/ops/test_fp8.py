"""e4m3 with scales: quantising a row at a time, and scales of blocks cut anywhere."""

import torch

from megalora.ops.fp8 import E4M3, LARGEST, Fp8Weight, quantise_fp8, quantise_rows


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02


def decoded(parts, columns: int) -> torch.Tensor:
    out = torch.empty(sum(len(part.codes) for part in parts), columns, dtype=torch.float64)
    at = 0
    for part in parts:
        part.decode_(out[at : at + len(part.codes)])
        at += len(part.codes)
    return out


def test_a_row_is_scaled_to_the_largest_number_and_rounded():
    x = random(5, 40)
    x[3] = 0
    codes, scale = quantise_rows(x)
    assert codes.dtype == E4M3 and codes.float().abs().amax(1).tolist() == [LARGEST] * 3 + [0.0, LARGEST]
    expected = x.abs().amax(1) / LARGEST
    assert scale[:, 0].equal(torch.where(expected == 0, 1.0, expected))
    near = codes.float() * scale
    # Half a step of three bits of mantissa, or of the smallest numbers (2^-9).
    assert ((near - x).abs() <= torch.maximum(x.abs() / 16, scale * 2**-10)).all()


def test_a_factor_of_the_columns_goes_in_before_the_scale():
    x, factor = random(5, 40), torch.rand(40)
    codes, scale = quantise_rows(x, factor)
    theirs = quantise_rows(x * factor)
    assert codes.float().equal(theirs[0].float()) and scale.equal(theirs[1])


def test_a_part_has_the_values_of_the_whole():
    blocks = Fp8Weight(random(20, 30).to(E4M3), torch.rand(3, 4), (8, 8))
    whole = blocks.codes.double() * blocks.scale.repeat_interleave(8, 0)[:20].repeat_interleave(8, 1)[:, :30]
    rows = quantise_fp8(random(20, 30).bfloat16())
    for weight, values in ((blocks, whole), (rows, rows.codes.double() * rows.scale)):
        for columns in ((0, 30), (5, 21), (16, 30)):
            part = decoded(weight.rows([(9, 20), (2, 5)], columns), columns[1] - columns[0])
            expected = torch.cat((values[9:20], values[2:5]))[:, slice(*columns)]
            torch.testing.assert_close(part, expected, rtol=1e-7, atol=0)


def test_not_a_number_stays_one():
    x = random(2, 16)
    x[1, 3] = float("nan")
    assert quantise_fp8(x).scale.isnan()[:, 0].tolist() == [False, True]
