"""Linears of a few rows with a norm before and a gate behind: the kernels (csrc/cuda/beside.h), compiled for a CPU."""

import ctypes

import pytest
import torch
from cuda_on_cpu import compiled

from megalora.ops.fp8 import quantise_rows
from megalora.ops.swiglu import ACTS

GATES = ["none", "silu", "gelu_tanh", "gelu"]  # as Gate in csrc/params.h


class Beside(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("delta", "norm", "sum")]
    _fields_ += [("eps", ctypes.c_float), ("precise", ctypes.c_bool), ("offset", ctypes.c_bool), ("gate", ctypes.c_int)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("emulated"), "*_skinny.cpp")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pointer(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def normed(x, weight, eps, precise, offset):
    """RMSNorm of x in bfloat16, rounded before the weight is applied or, where it is precise, behind it alone."""
    wide = x.float()
    made = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    weight = weight.float() + offset
    return ((made * weight) if precise else made.bfloat16().float() * weight.bfloat16().float()).bfloat16()


def dense(kernels, weight, *arguments):
    """The product with a weight whose rows have some stride."""
    wide = torch.zeros(weight.shape[0], weight.shape[1] + 24).bfloat16()
    wide[:, : weight.shape[1]] = weight
    x, bias, y, rows, beside = arguments
    sizes = (ctypes.c_int64 * 5)(rows, x.stride(0), weight.shape[1], weight.shape[0], wide.stride(0))
    kernels.run_dense(*map(pointer, (x, wide, bias, y)), sizes, ctypes.byref(beside))
    return weight.double()


def fp8(kernels, weight, *arguments):
    """The product with the weight quantised."""
    codes, scale = quantise_rows(weight.float())
    x, bias, y, rows, beside = arguments
    sizes = (ctypes.c_int64 * 5)(rows, x.stride(0), weight.shape[1], weight.shape[0], 0)
    more = pointer(codes), ctypes.c_int64(codes.stride(0)), pointer(scale), ctypes.byref(beside)
    kernels.run_fp8(pointer(x), None, pointer(bias), pointer(y), sizes, *more)
    return codes.double() * scale.double()


# Some threads without an octet, several rounds of them with an end inside; one row and more; an odd number of outputs.
CASES = [
    (34, 1024, 1, "none", True, False, False),
    (37, 64, 2, "none", False, False, True),
    (48, 4624, 1, "silu", True, False, False),
    (66, 5120, 4, "gelu_tanh", True, True, True),
    (6, 2064, 3, "gelu", False, True, False),
]


@pytest.mark.parametrize("format", [dense, fp8])
@pytest.mark.parametrize("outputs, inputs, rows, gate, adds, precise, offset", CASES)
def test_a_product_of_a_sum_that_is_normed(kernels, format, outputs, inputs, rows, gate, adds, precise, offset):
    x, delta = (randn(rows, inputs, seed=seed).bfloat16() for seed in (1, 2))
    norm, bias = (randn(n, seed=3).bfloat16() * 0.1 + (not offset) for n in (inputs, outputs))
    norm, bias = norm.bfloat16(), bias.bfloat16()
    weight = (randn(outputs, inputs, seed=4) / inputs**0.5).bfloat16()
    total = torch.full_like(x, float("nan"))
    y = torch.full((rows, outputs // (1 + (gate != "none"))), float("nan")).bfloat16()
    given = (pointer(x) for x in (delta if adds else None, norm, total if adds else None))
    beside = Beside(*given, 1e-5, precise, offset, GATES.index(gate))
    weight = format(kernels, weight, x, bias, y, rows, beside)
    wanted = x + delta if adds else x
    if adds:
        assert total.equal(wanted)
    wanted = (normed(wanted, norm, 1e-5, precise, offset).double() @ weight.t() + bias.double()).bfloat16()
    if gate != "none":
        by, what = wanted.chunk(2, -1)
        wanted = ACTS[gate].value(by) * what
    error = (y.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < 6e-3, error  # a rounding of y, of gate and up, and where a sum's order turns one


# With a norm and without, x where it is to lie and elsewhere; a row of A that is longer than what is asked for early.
DOWNS = [(1024, 16, 1, True, False), (2064, 5, 4, True, False), (18480, 3, 2, False, False), (320, 48, 3, False, True)]


@pytest.mark.parametrize("inputs, rank, rows, norms, inside", DOWNS)
def test_a_branch_of_a_sum_that_is_normed(kernels, inputs, rank, rows, norms, inside):
    room = -(-rank // 8) * 8 + 8
    X = torch.full((rows, inputs + room), float("nan")).bfloat16()
    x, delta = (randn(rows, inputs, seed=seed).bfloat16() for seed in (1, 2))
    norm, A = (1 + 0.1 * randn(inputs, seed=3)).bfloat16(), (randn(rank, inputs, seed=4) / inputs**0.5).bfloat16()
    wanted, total = x, torch.full_like(x, float("nan"))
    if inside:
        X[:, :inputs] = x
    if norms:
        wanted = normed(x + delta, norm, 1e-5, False, False)
    given = [pointer(one) if norms else None for one in (delta, norm, total)]
    beside = Beside(*given, 1e-5, False, False, 0)
    sizes = (ctypes.c_int64 * 5)(rows, X.stride(0) if inside else x.stride(0), inputs, rank, room)
    kernels.run_down(pointer(X if inside else x), pointer(A), pointer(X), sizes, ctypes.byref(beside))
    assert not norms or total.equal(x + delta)
    made, z, rest = X.split([inputs, rank, room - rank], 1)
    torch.testing.assert_close(made, wanted, rtol=0.01, atol=0.01)  # a sum's order may turn a rounding
    exact = made.double() @ A.double().t()
    assert (z.double() - exact).norm() / exact.norm() < 5e-3
    assert not rest.any()
