"""Rows of many weights in one piece: the values of each, whatever lies around it."""

from __future__ import annotations

import pytest
import torch

from megalora.ops.fp8 import quantise_fp8
from megalora.ops.nf4 import Absmax, quantise_nf4
from megalora.parallel.rows_stack import DenseRows, RowsStack

WEIGHTS, ROWS, COLUMNS = 6, 32, 128


def parts(kind: str, device: str = "cpu", columns: int = COLUMNS):
    generator = torch.Generator().manual_seed(3)
    for number in range(WEIGHTS):
        whole = torch.randn(ROWS + 16, columns + 64, generator=generator) * (number + 1)
        if kind == "fp8":
            weight = quantise_fp8(whole)
        else:
            weight = quantise_nf4(whole)
            if kind == "nf4, plain":
                m = weight.absmax
                plain = Absmax(plain=m.at(torch.arange(len(m.codes)), m.codes), nested_block=m.nested_block)
                weight = type(weight)(weight.shape, weight.codes, plain)
        (part,) = weight.rows([(16, 16 + ROWS)], (64, 64 + columns))
        yield part


@pytest.mark.parametrize("kind", ["fp8", "nf4", "nf4, plain"])
def test_the_whole_is_each_part_below_the_other(kind):
    stack, alone = RowsStack(WEIGHTS * ROWS), list(parts(kind))
    placed = [stack.put(i * ROWS, part) for i, part in enumerate(alone)]
    whole = stack.whole()
    assert whole is not None
    out = torch.empty(WEIGHTS * ROWS, COLUMNS + 8)[:, :COLUMNS]
    whole.decode_(out)
    for part, there, found in zip(alone, placed, out.chunk(WEIGHTS), strict=True):
        expected, again = torch.empty(2, ROWS, COLUMNS)
        part.decode_(expected)
        there.decode_(again)
        assert torch.equal(found, expected) and torch.equal(again, expected)
        assert there.nbytes == part.nbytes
        assert there.codes.untyped_storage().data_ptr() == whole.codes.untyped_storage().data_ptr()


def test_one_weight_is_a_stack_too():
    for kind in ("fp8", "nf4"):
        part = next(parts(kind))
        stack = RowsStack(ROWS)
        stack.put(0, part)
        found, expected = torch.empty(2, ROWS, COLUMNS)
        stack.whole().decode_(found)
        part.decode_(expected)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("odd", ["dense", "narrow", "other format", "fewer rows"])
def test_a_part_of_another_form_stays_where_it_is(odd):
    stack, several = RowsStack(WEIGHTS * ROWS), list(parts("nf4"))
    other = {
        "dense": lambda: DenseRows(torch.zeros(ROWS, COLUMNS)),
        "narrow": lambda: next(parts("nf4", columns=64)),
        "other format": lambda: next(parts("fp8")),
        "fewer rows": lambda: quantise_nf4(torch.randn(16, COLUMNS)).rows([(0, 16)], (0, COLUMNS))[0],
    }[odd]()
    first = stack.put(0, several[0])
    assert stack.put(ROWS, other) is other
    assert stack.whole() is None
    found, expected = torch.empty(2, ROWS, COLUMNS)
    first.decode_(found)
    several[0].decode_(expected)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8", "nf4", "nf4, plain"])
def test_one_kernel_decodes_the_whole(kind):
    stack, alone = RowsStack(WEIGHTS * ROWS), list(parts(kind))
    for i, part in enumerate(alone):
        on_gpu = {"codes": part.codes.cuda()}
        if kind == "fp8":
            on_gpu["scale"] = part.scale.cuda()
        else:
            on_gpu |= {"absmax": part.absmax.cuda(), "meaning": part.meaning.to("cuda")}
        stack.put(i * ROWS, type(part)(**vars(part) | on_gpu))
    out = torch.full((WEIGHTS * ROWS, COLUMNS + 8), 7.0, dtype=torch.bfloat16, device="cuda")
    stack.whole().decode_(out[:, :COLUMNS])
    expected = torch.empty(WEIGHTS * ROWS, COLUMNS, dtype=torch.bfloat16)
    for part, place in zip(alone, expected.chunk(WEIGHTS), strict=True):
        part.decode_(place)
    assert torch.equal(out[:, :COLUMNS].cpu(), expected)
    assert torch.all(out[:, COLUMNS:] == 7.0)
