"""Experts' products against float64: plain torch, our kernels in Triton's interpreter and in an emulated Gluon, both on
a CPU, and on a GPU.
"""

from __future__ import annotations

import sys

import pytest
import torch
from gluon_on_cpu import Descriptor, Pointer, emulated
from interpreted import needs_triton, run_interpreted

from megalora.ops import grouped_gpu
from megalora.ops.grouped import grouped, grouped_branch_, grouped_nt, grouped_outer_
from megalora.ops.routing import Routes
from megalora.ops.weighted_gate import SILU

# Rows of each expert: none, less than a block of 64, whole blocks, one more, and rows behind the last bound.
UNEVEN, ROWS = (0, 1, 63, 64, 65, 0, 128, 130, 192, 193, 300, 0), 1200
ONE_HAS_ALL = (0, 0, 0, 400, 0)
CASES = {"uneven": (UNEVEN, ROWS), "one has all": (ONE_HAS_ALL, 400), "few rows": ((1, 0, 2), 5)}


def drawn(counts, rows, outputs, inputs, rank, device="cpu", dtype=torch.float32):
    """(bounds, x, dy, W, z, A); what belongs to no expert is NaN."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    bounds = torch.tensor(counts).cumsum(0).to(device, torch.int32)
    x, dy, z = random(rows, inputs), random(rows, outputs), random(rows, rank)
    for one in (x, dy, z):
        one[sum(counts) :] = float("nan")
    return bounds, x, dy, random(len(counts), outputs, inputs), z, random(len(counts), rank, inputs)


def parts(bounds):
    """The rows of each expert."""
    ends = bounds.tolist()
    return [slice(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


def product(bounds, x, P):
    """x P_e in float64."""
    return torch.cat([x[rows].double() @ P[e].double() for e, rows in enumerate(parts(bounds))])


def outer(bounds, a, b):
    """a_e^T b_e in float64."""
    return torch.stack([a[rows].double().t() @ b[rows].double() for rows in parts(bounds)])


def wanted(bounds, x, dy, W, z, A):
    """[x W^T, dy W, dy W + z A] in float64."""
    backward = product(bounds, dy, W)
    return product(bounds, x, W.mT), backward, backward + product(bounds, z, A)


def gradients(experts, rows, ranks, device="cpu", dtype=torch.float32):
    """Gradients of B, ones, of two linears that share the rows and ranks, or of one where these are one number."""
    grads, row, rank = [], 0, 0
    for i, (n, r) in enumerate(zip(rows, ranks, strict=True)):
        out = torch.ones(experts, n, r, device=device, dtype=dtype)
        grads.append(grouped_gpu.BranchGrad(out, slice(row, row + n), slice(rank, rank + r), 0.5 + i))
        row, rank = row + n, rank + r
    return grads


def check_branch(made, counts, outputs, ranks, tolerance, **how):
    """The gradients and dz that `made` gives of dy, z and B, in one part and in two."""
    bounds, _, dy, W, z, _ = drawn(counts, sum(counts) + 5, sum(outputs), 40, sum(ranks), **how)
    B, end = W[:, :, : sum(ranks)] if W.shape[2] >= sum(ranks) else W, sum(counts)
    whole = outer(bounds, dy, z)
    for parts_of_rows, parts_of_ranks in ((outputs, ranks), ([sum(outputs)], [sum(ranks)])):
        grads = gradients(len(counts), parts_of_rows, parts_of_ranks, dy.device)
        dz = made(grads, dy, z, B, bounds)
        dz = dz[1] if isinstance(dz, tuple) else dz
        assert dz.shape == z.shape and apart(dz[:end], product(bounds, dy, B)) < tolerance
        for out, rows, columns, scale in grads:
            assert apart(out, 1 + scale * whole[:, rows, columns]) < tolerance


def apart(found, goal):
    """The largest difference, of the largest number."""
    return ((found.double() - goal).abs().max() / goal.abs().max()).item()


@pytest.mark.parametrize("name", CASES)
def test_plain_torch(name):
    counts, rows = CASES[name]
    device_bounds, *operands = drawn(counts, rows, 24, 40, 6, dtype=torch.float64)
    bounds, (x, dy, W, z, A) = tuple(device_bounds.tolist()), operands
    forward, backward, both = wanted(device_bounds, *operands)
    end = bounds[-1]
    room = torch.full((rows, 32), 7.0, dtype=torch.float64)
    assert grouped_nt(x, W, bounds, out=room[:, :30]) is not room
    assert torch.equal(grouped_nt(x, W, bounds)[:end], room[:end, :24])
    assert not room[:end, 24:30].any() and (room[:, 30:] == 7).all()
    assert apart(room[:end, :24], forward) < 1e-14
    assert apart(grouped(dy, W, bounds)[:end], backward) < 1e-14
    assert apart(grouped(dy, W, bounds, z, A)[:end], both) < 1e-14
    outs = [torch.ones(len(counts), n, 40, dtype=torch.float64) for n in (2, 4)]
    grouped_outer_(outs, z, x, bounds, 0.5)
    assert apart(torch.cat(outs, 1), 1 + 0.5 * outer(device_bounds, z, x)) < 1e-14

    def made(grads, dy, z, B, bounds):
        return grouped_branch_(grads, dy, z, B, tuple(bounds.tolist()))

    check_branch(made, counts, [16, 8], [4, 2], 1e-6)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name):
    run_interpreted(__file__, name)


def interpreted(name: str) -> None:
    counts, rows = CASES[name]
    bounds, x, dy, W, z, A = drawn(counts, rows, 72, 136, 24)
    end = sum(counts)
    for turned, left, right, columns in ((True, x, A, 64), (False, dy, W[:, :, :24], 24)):
        room = torch.full((rows, 70), 7.0)
        grouped_gpu._thin_(room[:, :columns], left, right, bounds, turned)
        goal = product(bounds, left, right.mT if turned else right)
        assert apart(room[:end, :24], goal) < 1e-6
        assert not room[:end, 24:columns].any() and (room[end:] == 7).all() and (room[:, columns:] == 7).all()
    goal = outer(bounds, z, x)
    outs = [torch.ones(len(counts), n, 136) for n in (16, 8)]
    grouped_gpu.outer_(outs, z, x, bounds, 0.5)
    assert apart(torch.cat(outs, 1), 1 + 0.5 * goal) < 1e-6
    long = torch.ones(len(counts), 136, 24)
    grouped_gpu.outer_([long], x, z, bounds, 0.5)
    assert apart(long.mT, 1 + 0.5 * goal) < 1e-6
    empty = torch.tensor(counts) == 0
    assert (outs[0][empty] == 1).all()
    assert grouped_gpu.joins(gradients(len(counts), [300, 200], [16, 8]), z)
    check_branch(grouped_gpu.branch_, counts, [300, 200], [16, 8], 1e-5)
    check_at_tokens(counts, rows)


def check_at_tokens(counts, rows, device="cpu", dtype=torch.float32):
    """Rows at their tokens give the bits of rows that lie one behind another; z, in steps of its own, on a GPU."""
    bounds, x, dy, W, z, A = drawn(counts, rows, 328, 264, 24, device, dtype)
    end, choices, how = sum(counts), 3, {"device": device, "dtype": dtype}
    pair = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(device)
    token = pair // choices
    x, dy, B = torch.nan_to_num(x)[: rows // choices + 1], torch.nan_to_num(dy)[: rows // choices + 1], W[:, :, :24]
    X = torch.full((rows, 264 + 64), 7.0, **how)
    X[:, :264] = x[token]
    grouped_gpu._thin_(X[:, 264:], X[:, :264], A, bounds, True)
    found = grouped_gpu.dispatch_thin(x, pair, choices, A, bounds, 64)
    same = 328 if device == "cuda" else 264
    assert torch.equal(found[:end, :same], X[:end, :same]) and not found[:end, 288:].any()
    assert apart(found[:end, 264:288], product(bounds, x[token], A.mT)) < (6e-3 if device == "cuda" else 1e-6)
    weights = torch.rand(rows // choices + 1, choices, generator=torch.Generator().manual_seed(2)).to(device)
    gate_up, routes = torch.cat([X[:, :264], X[:, :264].flip(0)], 1), Routes(pair, pair, bounds, len(x), choices)
    gated = SILU.forward(gate_up, weights, routes, 64)
    made = grouped_gpu.gate_thin(gate_up, weights, pair, A, bounds, 64)
    assert apart(made[:end, 264:288], product(bounds, made[:, :264], A.mT)) < (6e-3 if device == "cuda" else 1e-6)
    assert not made[:end, 288:].any()
    if device == "cuda":
        assert torch.equal(made[:end, :264], gated[:end, :264])
    else:
        torch.testing.assert_close(made[:end, :264], gated[:end, :264], rtol=1e-5, atol=1e-6)
    outs, at_tokens = ([torch.ones(len(counts), n, 264, device=device) for n in (16, 8)] for _ in range(2))
    grouped_gpu.outer_(outs, z, X[:, :264], bounds, 0.5)
    grouped_gpu.outer_(at_tokens, z, x, bounds, 0.5, pair, choices)
    assert all(torch.equal(*both) for both in zip(outs, at_tokens, strict=True))
    grads, again = (gradients(len(counts), [300, 28], [16, 8], device) for _ in range(2))
    gathered = dy[token].contiguous()
    _, dz = grouped_gpu.branch_(grads, gathered, z, B, bounds)
    taken, dz_again = grouped_gpu.branch_(again, dy, z, B, bounds, pair, choices)
    assert torch.equal(taken[:end], gathered[:end]) and torch.equal(dz[:end], dz_again[:end])
    assert all(torch.equal(one.out, two.out) for one, two in zip(grads, again, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["forward", "backward", "both"])
def test_emulated(name, kind):
    """The kernel of Hopper, its partitions as threads: no deadlock, no buffer given back early, no row of another's."""
    counts, rows = CASES[name]
    bounds, x, dy, W, z, A = drawn(counts, rows, 328, 272, 24)
    number = ["forward", "backward", "both"].index(kind)
    goal, turned, end = wanted(bounds, x, dy, W, z, A)[number], number == 0, sum(counts)
    left, columns = (x, 328) if turned else (dy, 272)
    out, counter = torch.full((rows, columns + 4), 7.0), torch.zeros(1, dtype=torch.int32)
    block = [1, 128, 64] if turned else [1, 64, 128]
    extra = number == 2
    for program in range(3):
        module = emulated("megalora.ops.grouped_hopper", program, 3)
        module.wide_kernel(
            Descriptor(left, [64, 64]), Descriptor(W, block), Descriptor(z, [64, 64]) if extra else None,
            Descriptor(A, [1, 64, 128]) if extra else None, Pointer(out.view(-1)), columns + 4, Pointer(bounds),
            Pointer(counter), len(counts), columns, left.shape[1], 24,
            TURNED=turned, EXTRA=extra, EXPERTS=32, N=128, K=64, STAGES=4,
        )  # fmt: skip
    assert apart(out[:end, :columns], goal) < 1e-6
    assert (out[end:] == 7).all() and (out[:, columns:] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [(1536, 2048, 32), (2048, 768, 16), (328, 200, 24), (256, 2880, 256)])
def test_on_a_gpu(name, sizes):
    """bfloat16 against float64, the same bits again, and each row as without the others' experts."""
    (outputs, inputs, rank), (counts, rows) = sizes, CASES[name]
    bounds, *operands = drawn(counts, rows, outputs, inputs, rank, "cuda", torch.bfloat16)
    x, dy, W, z, A = operands
    goals, end = wanted(bounds, *operands), sum(counts)

    def made():
        outs = [torch.zeros(len(counts), n, inputs, device="cuda") for n in (rank // 2, rank - rank // 2)]
        grouped_outer_(outs, z, x, bounds, 0.5)
        return [
            grouped_nt(x, W, bounds)[:end], grouped(dy, W, bounds)[:end], grouped(dy, W, bounds, z, A)[:end],
            2 * torch.cat(outs, 1), grouped_nt(x, A, bounds)[:end], grouped(dy, W[:, :, :rank], bounds)[:end],
        ]  # fmt: skip

    ours, again = made(), made()
    goals = [*goals, outer(bounds, z, x), product(bounds, x, A.mT), goals[1][:, :rank]]
    for found, repeated, goal in zip(ours, again, goals, strict=True):
        assert apart(found, goal) < 6e-3 and torch.equal(found, repeated)
    how = {"device": "cuda", "dtype": torch.bfloat16}
    if rank <= 64:
        half = outputs // 2
        check_branch(grouped_branch_, counts, [half, outputs - half], [rank // 2, rank - rank // 2], 6e-3, **how)
    check_at_tokens(counts, rows, **how)
    last = max(e for e, n in enumerate(counts) if n)
    alone = torch.zeros_like(bounds)
    alone[last:] = counts[last]
    part = slice(end - counts[last], end)
    assert torch.equal(grouped_nt(x[part], W, alone), ours[0][part])
    assert torch.equal(grouped(dy[part], W, alone, z[part], A), ours[2][part])


if __name__ == "__main__":
    interpreted(sys.argv[1])
