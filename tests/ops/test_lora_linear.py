"""The pieces of a linear with LoRA branches, by themselves and put together, against plain autograd.

Legend as in megalora.ops.lora_linear: T tokens, I in_features, R rank, C columns of room, O out_features.
"""

import types

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megalora.ops import extension, lora_linear
from megalora.ops.dropout import Dropout, dropout
from megalora.ops.lora_linear import (
    kernels_take,
    lora_down_,
    lora_down_input_grad_,
    lora_down_weight_grad,
    lora_up_weight_grad,
    room_for,
)

T, I, R, C, O = 9, 14, 5, 8, 11  # noqa: E741
INDEX = torch.arange(T) * 3 + 7
DRAW = Dropout(p=0.4, seed=3, site=2, step=1, feature_offset=5)
DRAWS = pytest.mark.parametrize("draw", [None, DRAW], ids=["no dropout", "dropout"])


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask(draw: Dropout | None) -> torch.Tensor:
    """What each x is multiplied by [T, I]."""
    ones = torch.ones(T, I, dtype=torch.float64)
    return ones if draw is None else dropout(ones, INDEX, draw)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("device, step", [("cpu", 8), ("cuda", 64), ("mps", 8)])
def test_room_is_the_rank_rounded_up(device, step):
    assert room_for(0, device) == 0
    for rank in range(1, 3 * step + 1):
        assert room_for(rank, device) % step == 0 and rank <= room_for(rank, device) < rank + step


# ---- the pieces


@DRAWS
@pytest.mark.parametrize("rank", [R, C])
def test_down_writes_z_behind_x_and_zeros_behind_that(draw, rank):
    x, A = randn(0, T, I), randn(1, rank, I)
    X = torch.full((T, I + C), float("nan"), dtype=torch.float64)
    X[:, :I] = x
    lora_down_(X, A, INDEX, draw)
    assert X[:, :I].equal(x) and (X[:, I + rank :] == 0).all()
    close(X[:, I : I + rank], (x * mask(draw)) @ A.t())
    copied = torch.full_like(X, float("nan"))
    lora_down_(copied, A, INDEX, draw, x)
    assert copied.equal(X)


@DRAWS
@pytest.mark.parametrize("name", ["whole", "a view"])
def test_gradients_of_down_are_those_of_autograd(draw, name):
    """dz and x are views of wider rows, where they stand in a layer."""
    x, A = randn(0, T, I).requires_grad_(), randn(1, R, I).requires_grad_()
    wide_x, wide_dz, wide_dx = randn(0, T, I), randn(2, T, R), randn(3, T, I)
    if name == "a view":
        wide_x, wide_dz, wide_dx = (torch.cat([t, randn(4, T, C)], 1) for t in (wide_x, wide_dz, wide_dx))
    dz, dx = wide_dz[:, :R], wide_dx[:, :I]
    before, behind = dx.clone(), wide_dx[:, I:].clone()
    wanted_dx, wanted_dA = torch.autograd.grad((x * mask(draw)) @ A.t(), (x, A), dz)

    dA = lora_down_weight_grad(dz, wide_x[:, :I], INDEX, draw)
    assert dA.shape == (R, I)
    close(dA, wanted_dA)
    out = torch.empty_like(before)
    lora_down_input_grad_(dx, dz, A.detach(), INDEX, draw, out)
    assert dx.equal(before)
    lora_down_input_grad_(dx, dz, A.detach(), INDEX, draw)
    close(dx, before + wanted_dx)
    assert out.equal(dx)
    assert wide_dx[:, I:].equal(behind)


def test_gradient_of_up_is_that_of_autograd():
    B, z, dy = randn(0, O, R).requires_grad_(), randn(1, T, C)[:, :R], randn(2, T, 2 * O)[:, O:]
    (wanted,) = torch.autograd.grad(1.75 * z @ B.t(), B, dy)
    before = z.clone()
    close(lora_up_weight_grad(dy, z, 1.75), wanted)
    assert z.equal(before)


@pytest.mark.parametrize("narrow", [torch.float64, torch.float32])
def test_gradient_of_up_is_added_where_one_is_kept(narrow):
    z, dy, into = randn(1, T, C)[:, :R].to(narrow), randn(2, T, 2 * O)[:, O:].to(narrow), randn(3, O, R)
    wanted = into + 1.75 * dy.double().t() @ z.double()
    assert lora_up_weight_grad(dy, z, 1.75, into) is None
    tolerance = 1e-13 if narrow == torch.float64 else 1e-5
    torch.testing.assert_close(into, wanted, rtol=tolerance, atol=tolerance)


# ---- put together, as the module's docstring has it


@DRAWS
def test_two_linears_in_one_matrix(draw):
    """Two linears of one input, one below the other in P, each with its own columns for z."""
    outs, ranks, scales = (6, 5), (2, 3), (0.5, 3.0)
    x = randn(0, T, I).requires_grad_()
    W = [randn(10 + i, o, I) for i, o in enumerate(outs)]
    A = [randn(20 + i, r, I).requires_grad_() for i, r in enumerate(ranks)]
    B = [randn(30 + i, o, r).requires_grad_() for i, (o, r) in enumerate(zip(outs, ranks, strict=True))]
    branches = zip(W, A, B, scales, strict=True)
    wanted = torch.cat([x @ w.t() + s * (x * mask(draw)) @ a.t() @ b.t() for w, a, b, s in branches], 1)
    dy = randn(40, T, sum(outs))
    wanted_dx, *wanted_grads = torch.autograd.grad(wanted, (x, *A, *B), dy)

    with torch.no_grad():
        P = torch.zeros(sum(outs), I + C, dtype=torch.float64)
        P[:6, :I], P[6:, :I] = W
        P[:6, I : I + 2], P[6:, I + 2 : I + 5] = 0.5 * B[0], 3.0 * B[1]
        X, whole_A = torch.cat([x, torch.empty(T, C, dtype=x.dtype)], 1), torch.cat(A)
        lora_down_(X, whole_A, INDEX, draw)
        close(X @ P.t(), wanted)
        dX = dy @ P
        dz, z = dX[:, I : I + 5], X[:, I:]
        dA = lora_down_weight_grad(dz, X[:, :I], INDEX, draw).split(ranks)
        dB = [lora_up_weight_grad(dy[:, :6], z[:, :2], 0.5), lora_up_weight_grad(dy[:, 6:], z[:, 2:5], 3.0)]
        lora_down_input_grad_(dX[:, :I], dz, whole_A, INDEX, draw)
    close(dX[:, :I], wanted_dx)
    for found, grad in zip([*dA, *dB], wanted_grads, strict=True):
        close(found, grad)


@DRAWS
def test_low_precision(draw):
    X, A = randn(0, T, I + C).to(torch.bfloat16), randn(1, R, I).to(torch.bfloat16)
    lora_down_(X, A, INDEX, draw)
    dz, dy = randn(2, T, R).to(torch.bfloat16), randn(3, T, O).to(torch.bfloat16)
    x, z = X[:, :I], X[:, I : I + R]
    torch.testing.assert_close(z, ((x.double() * mask(draw)) @ A.double().t()).to(torch.bfloat16), rtol=0.02, atol=0.05)
    dtypes = {lora_down_weight_grad(dz, x, INDEX, draw).dtype, lora_up_weight_grad(dy, z, 2.0).dtype}
    assert dtypes == {torch.float32 if extension.has_kernels("cpu") else torch.bfloat16}
    dx = randn(4, T, I).to(torch.bfloat16)
    wanted = dx.double() + mask(draw) * (dz.double() @ A.double())
    lora_down_input_grad_(dx, dz, A, INDEX, draw)
    torch.testing.assert_close(dx, wanted.to(torch.bfloat16), rtol=0.02, atol=0.1)


# ---- what the kernels of a GPU take


@pytest.fixture
def granting(monkeypatch):
    """Makes GPUs 0, 1 .. grant a block so many bytes of shared memory; gives the list of the GPUs asked, in order."""

    def granting(*bytes_by_index):
        asked = []

        def get_device_properties(index):
            asked.append(index)
            return types.SimpleNamespace(shared_memory_per_block_optin=bytes_by_index[index])

        monkeypatch.setattr(torch.cuda, "get_device_properties", get_device_properties)
        return asked

    monkeypatch.setattr(extension, "has_kernels", lambda device_type: True)
    lora_linear.fits_gpu.cache_clear()
    yield granting
    lora_linear.fits_gpu.cache_clear()


def on_gpu(index: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(16, 256, dtype=torch.bfloat16, device=f"cuda:{index}")


@pytest.mark.parametrize(
    "kilobytes, ranks",
    [(227, set(range(8, 193, 8))), (163, set(range(8, 193, 8))), (99, set())],
    ids=["9.0", "8.0", "8.6, 8.9 and 12.0"],
)
def test_a_gpu_runs_kernels_that_its_shared_memory_has_room_for(granting, kilobytes, ranks):
    granting(kilobytes << 10)
    x = on_gpu(0)
    assert {rank for rank in range(8, 257, 8) if kernels_take(x, rank, None)} == ranks


def test_each_gpu_is_asked_once_how_much_shared_memory_it_has(granting):
    asked = granting(227 << 10, 99 << 10)
    for _ in range(3):
        assert kernels_take(on_gpu(0), 16, None) and not kernels_take(on_gpu(1), 16, None)
    assert asked == [0, 1]
    assert kernels_take(torch.empty(16, 256), 16, None) and asked == [0, 1]
