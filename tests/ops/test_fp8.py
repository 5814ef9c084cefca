"""e4m3 with scales: quantising a row at a time, and scales of blocks cut anywhere."""

import torch

from megalora.ops.fp8 import (
    E4M3,
    LARGEST,
    Fp8Weight,
    branch_terms_,
    quantise_fp8,
    quantise_rows,
    quantise_with_branch,
    terms_for,
)


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


def test_a_branch_in_three_terms_has_bfloat16_s_precision():
    """At B as after one small step and as after many, with an input of outliers; and a branch of zeros."""
    tokens, inputs, outputs, rank = 64, 256, 128, 16
    codes_W, scale = quantise_rows(random(outputs, inputs))
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(4))
    x[:, 3] *= 40
    z = torch.randn(tokens, rank, generator=torch.Generator().manual_seed(5)) * 0.6
    X = torch.cat((x, z, torch.zeros(tokens, 64 - rank)), 1).bfloat16()
    for size, bound in ((1e-4, 4e-3), (1e-2, 2e-3), (1.0, 2e-3), (0.0, 0.0)):
        branch = (random(outputs, rank) / 0.02 * size).bfloat16()
        codes, factor = torch.zeros(outputs, inputs + terms_for(rank)).to(E4M3), torch.empty(rank)
        codes[:, :inputs] = codes_W
        branch_terms_(branch, scale[:, 0], codes[:, inputs:], factor)
        quantised, row = quantise_with_branch(X, inputs, rank, factor)
        y = (quantised.double() * row) @ (codes.double() * scale).t()
        base = (quantised[:, :inputs].double() * row) @ (codes_W.double() * scale).t()
        wanted = X[:, inputs : inputs + rank].double() @ branch.double().t()
        assert (y - base - wanted).norm() <= bound * wanted.norm() + 1e-12
        if size <= 1e-2:  # x is quantised as without a branch
            assert quantised[:, :inputs].float().equal(quantise_rows(X[:, :inputs])[0].float())


def test_a_large_z_scales_the_row_rather_than_being_cut_off():
    X = torch.ones(1, 32).bfloat16()
    X[:, 16:] = 1000
    codes, scale = quantise_with_branch(X, 16, 16, torch.ones(16))
    found = codes.float() * scale
    torch.testing.assert_close(found[:, 16:32], X[:, 16:].float(), rtol=2e-3, atol=0)
    torch.testing.assert_close(found[:, :16], X[:, :16].float(), rtol=0.07, atol=0)
