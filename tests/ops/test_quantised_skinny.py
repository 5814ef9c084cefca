"""The kernels of few rows on quantised weights (csrc/cuda/fp8_skinny.cu, nf4_skinny.cu), compiled for a CPU.

A block's threads are threads here: which codes meet which columns, parts, tails, and that nothing beside the tensors is
read.
"""

import ctypes

import pytest
import torch
from cuda_on_cpu import compiled

from megalora.ops.fp8 import quantise_rows
from megalora.ops.nf4 import quantise_nf4


class Part(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "absmax", "scale", "numbers", "offset")]
    _fields_ += [(name, ctypes.c_int64) for name in ("scales", "outputs", "first", "width")]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("emulated"), "*_skinny.cpp")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def run(kernel, W, rows, room, *arguments):
    """Check y = [x | z] [W | branch]^T + bias; W [O, I] the decoded weight."""
    outputs, inputs = W.shape
    X = randn(rows, inputs + room + 16, seed=9).bfloat16()[:, : inputs + room]
    branch = (randn(outputs, room, seed=8) * 0.02).bfloat16()
    bias = randn(outputs, seed=7).bfloat16() if room else None
    y = torch.full((rows, outputs), float("nan")).bfloat16()
    sizes = (ctypes.c_int64 * 5)(rows, X.stride(0), inputs, outputs, room)
    kernel(*map(pointer, (X, branch, bias, y)), sizes, *arguments)
    wanted = X.double() @ torch.cat((W.double(), branch.double()), 1).t() + (0 if bias is None else bias.double())
    assert (y.double() - wanted).norm() / wanted.norm() < 3e-3


# A whole step of a warp, less, several rounds of all warps with an end inside; one tile of rows, two, four.
SIZES = [(40, 1024, 1, 0), (17, 64, 9, 8), (24, 2112, 17, 16), (16, 192, 32, 200)]


# Less than a lane has under way, an end inside of it, several rounds with one; a warp without a second output.
FP8_SIZES = [(40, 1024, 1, 0), (17, 64, 4, 8), (5, 2064, 2, 16), (33, 4096, 3, 264), (16, 5136, 1, 24)]


@pytest.mark.parametrize("outputs, inputs, rows, room", FP8_SIZES)
def test_e4m3_has_the_product_of_its_values(kernels, outputs, inputs, rows, room):
    codes, scale = quantise_rows(randn(outputs, inputs, seed=1) * 0.02)
    wide = torch.zeros(outputs, inputs + 48, dtype=torch.uint8)  # rows of some stride
    wide[:, :inputs] = codes.view(torch.uint8)
    W = codes.double() * scale.double()
    nothing = ctypes.create_string_buffer(64)  # beside the product, of which test_step_linear.py has more
    run(kernels.run_fp8, W, rows, room, pointer(wide), ctypes.c_int64(wide.stride(0)), pointer(scale), nothing)


def run_nf4(kernels, parts, rows, room):
    decoded, given = [], (Part * len(parts))()
    for part, one in zip(parts, given, strict=True):
        W = torch.empty(len(part.codes), part.columns, dtype=torch.bfloat16)
        part.decode_(W)
        decoded.append(W)
        meaning = part.meaning
        for name, x in {"codes": part.codes, "absmax": part.absmax}.items():
            setattr(one, name, x.data_ptr())
        for name in ("scale", "numbers", "offset"):
            setattr(one, name, getattr(meaning, name).data_ptr())
        one.scales, one.outputs = len(meaning.scale), len(part.codes)
        one.first, one.width = part.first // 64, part.width // 64
    run(kernels.run_nf4, torch.cat(decoded), rows, room, given, ctypes.c_int64(len(parts)))


@pytest.mark.parametrize("outputs, inputs, rows, room", SIZES)
def test_nf4_has_the_product_of_the_decoded_weight(kernels, outputs, inputs, rows, room):
    (part,) = quantise_nf4(randn(outputs, inputs, seed=1) * 0.02).rows([(0, outputs)], (0, inputs))
    run_nf4(kernels, [part], rows, room)


def test_nf4_takes_parts_of_several_weights(kernels):
    weights = [quantise_nf4(randn(64, 512, seed=seed) * 0.02) for seed in (1, 2)]
    parts = [part for weight in weights for part in weight.rows([(3, 20), (40, 61)], (128, 320))]
    run_nf4(kernels, parts, 5, 24)
