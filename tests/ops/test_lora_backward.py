"""The backward pass of LoRA branches, and the forward and backward passes through the SwiGLU before one, against
autograd of the plain formulas.

Legend as in megalora.ops.lora_backward: T tokens, I in_features, R rank of all branches of the input together; C
columns of room for z.
"""

import pytest
import torch

from megalora.ops.dropout import Dropout, dropout
from megalora.ops.lora_backward import UpBranch, add_down_weight_grad_, lora_backward_, swiglu_lora_backward_
from megalora.ops.lora_linear import lora_down_
from megalora.ops.swiglu import ACTS, swiglu, swiglu_down

T, I, C = 9, 14, 8  # noqa: E741
INDEX = torch.arange(T) * 3 + 7
DRAW = Dropout(p=0.4, seed=3, site=2, step=1, feature_offset=5)
DRAWS = pytest.mark.parametrize("draw", [None, DRAW], ids=["no dropout", "dropout"])
BRANCHES = pytest.mark.parametrize("ranks", [(5,), (2, 3, 1)], ids=["one branch", "three branches"])


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask(draw: Dropout | None) -> torch.Tensor:
    """What each x is multiplied by [T, I]."""
    ones = torch.ones(T, I, dtype=torch.float64)
    return ones if draw is None else dropout(ones, INDEX, draw)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def gradients_of_down(x, A, dz, draw):
    """(dx, dA) of z = dropout(x) A^T."""
    x, A = x.clone().requires_grad_(), A.clone().requires_grad_()
    return torch.autograd.grad((x * mask(draw)) @ A.t(), (x, A), dz)


# ---- x is read


@DRAWS
@BRANCHES
@pytest.mark.parametrize("apart", [False, True], ids=["in place", "apart"])
def test_dx_and_dA_are_those_of_autograd(draw, ranks, apart):
    """dx with dz behind it, and x with z, are views of wider rows, where they stand in a layer."""
    rank = sum(ranks)
    X, dX, A = randn(0, T, I + C), randn(1, T, I + C), randn(2, rank, I)
    x, dx, dz = X[:, :I], dX[:, :I], dX[:, I : I + rank]
    wanted_dx, wanted_dA = gradients_of_down(x, A, dz, draw)
    read, before = X.clone(), dX.clone()
    dA = [randn(10 + i, r, I) for i, r in enumerate(ranks)]
    wanted_dA = torch.cat(dA) + wanted_dA
    out = torch.full((T, I), float("nan"), dtype=torch.float64) if apart else None

    lora_backward_(dx, dz, x, A, INDEX, draw, dA, out)

    close(out if apart else dx, before[:, :I] + wanted_dx)
    close(torch.cat(dA), wanted_dA)
    assert X.equal(read) and dX[:, I:].equal(before[:, I:])
    assert not apart or dX.equal(before)


@DRAWS
@BRANCHES
def test_dA_is_cut_into_those_of_the_branches_and_added(draw, ranks):
    rank = sum(ranks)
    x, dz, A = randn(0, T, I + C)[:, :I], randn(1, T, C)[:, :rank], randn(2, rank, I)
    whole = randn(3, rank, I)  # of one buffer, as the gradients of a stage are
    wanted = whole + gradients_of_down(x, A, dz, draw)[1]
    add_down_weight_grad_(whole.split(ranks), dz, x, INDEX, draw)
    close(whole, wanted)


@DRAWS
def test_gradients_in_float32_of_an_input_in_bfloat16(draw):
    """Masters are float32: what is added to them is not rounded to the compute dtype's 2^-8 of the sum."""
    x, dx, dz, A = (t.to(torch.bfloat16) for t in (randn(0, T, I), randn(1, T, I), randn(2, T, 5), randn(3, 5, I)))
    wanted_dx, wanted_dA = gradients_of_down(x.double(), A.double(), dz.double(), draw)
    wanted_dx += dx.double()
    dA = [torch.full((2, I), 100.0), torch.full((3, I), 100.0)]
    lora_backward_(dx, dz, x, A, INDEX, draw, dA)
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=0.02, atol=0.1)
    torch.testing.assert_close(torch.cat(dA).double() - 100, wanted_dA, rtol=0.02, atol=0.1)


# ---- x = silu(gate) * up is made

GATE, UP = slice(0, I), slice(I, 2 * I)
RANK_GATE, RANK_UP, RANK_DOWN = 2, 3, 5
SCALES = {"gate": 0.5, "up": 3.0}


@DRAWS
@pytest.mark.parametrize(
    "names", [(), ("gate", "up"), ("up", "gate"), ("gate",), ("up",)], ids=lambda names: "+".join(names) or "none"
)
@pytest.mark.parametrize("apart", [False, True], ids=["z side by side", "z apart"])
@pytest.mark.parametrize("act", ACTS)
def test_backward_through_the_gate_is_that_of_autograd(draw, names, apart, act):
    """gate_up as its linears make it, with s z B^T in it; ups: the branches whose dB is wanted."""
    z = randn(0, T, C)
    places = {"gate": z[:, :RANK_GATE], "up": z[:, RANK_GATE : RANK_GATE + RANK_UP]}
    if apart:
        places = {name: place.clone() for name, place in places.items()}
    rows = {"gate": GATE, "up": UP}
    B = {"gate": randn(1, I, RANK_GATE).requires_grad_(), "up": randn(2, I, RANK_UP).requires_grad_()}
    A = randn(3, RANK_DOWN, I).requires_grad_()
    gate_up = randn(4, T, 2 * I) + torch.cat([SCALES[n] * places[n] @ B[n].t() for n in ("gate", "up")], 1)
    dX = randn(5, T, I + C)
    dx, dz = dX[:, :I], dX[:, I : I + RANK_DOWN]

    gate, up = gate_up[:, GATE], gate_up[:, UP]
    x = ACTS[act].value(gate) * up
    of = [gate_up, A, *(B[name] for name in names)]
    wanted, wanted_dA, *wanted_dB = torch.autograd.grad([x, (x * mask(draw)) @ A.t()], of, [dx, dz])

    read, kept_z = gate_up.detach().clone(), z.clone()
    dA = randn(6, RANK_DOWN, I)
    wanted_dA = dA + wanted_dA
    ups = [UpBranch(rows[n], places[n], SCALES[n], randn(7 + i, *B[n].shape)) for i, n in enumerate(names)]
    wanted_dB = [up.dB + grad for up, grad in zip(ups, wanted_dB, strict=True)]
    behind = dX[:, I:].clone()

    given = gate_up.detach()
    grad = swiglu_lora_backward_(dx, given, dz, A.detach(), INDEX, draw, dA, ups, act)

    assert grad.shape == (T, 2 * I) and grad.is_contiguous()
    close(grad, wanted)
    close(dA, wanted_dA)
    for branch, wanted_grad in zip(ups, wanted_dB, strict=True):
        close(branch.dB, wanted_grad)
    assert given.equal(read) and z.equal(kept_z) and dX[:, I:].equal(behind)


@DRAWS
@pytest.mark.parametrize("wanted_dB", [True, False], ids=["dB", "no dB"])
@pytest.mark.parametrize("gated", [True, False], ids=["gate and up in one linear", "no gate"])
@pytest.mark.parametrize("act", ACTS)
def test_backward_through_one_linear_is_that_of_autograd(draw, gated, act, wanted_dB):
    """Of gate and up, fused in the file, and of up without a gate: one branch, s z B^T, of all of it."""
    width = I * (1 + gated)
    z, B, A = randn(0, T, RANK_UP), randn(1, width, RANK_UP).requires_grad_(), randn(2, RANK_DOWN, I).requires_grad_()
    gate_up, dX, dA = randn(3, T, width) + 3.0 * z @ B.t(), randn(4, T, I + C), randn(5, RANK_DOWN, I)
    dx, dz = dX[:, :I], dX[:, I : I + RANK_DOWN]
    x = ACTS[act].value(gate_up[:, :I]) * gate_up[:, I:] if gated else ACTS[act].value(gate_up)
    of_up, of_A, of_B = torch.autograd.grad([x, (x * mask(draw)) @ A.t()], [gate_up, A, B], [dx, dz])
    of_A = dA + of_A
    branch = UpBranch(slice(0, width), z, 3.0, torch.ones_like(B))
    ups = [branch] if wanted_dB else []
    grad = swiglu_lora_backward_(dx, gate_up.detach(), dz, A.detach(), INDEX, draw, dA, ups, act)
    close(grad, of_up)
    close(dA, of_A)
    close(branch.dB.detach(), 1.0 + of_B if wanted_dB else torch.ones_like(B))


@DRAWS
@pytest.mark.parametrize("rank", [5, C])
def test_forward_through_swiglu_is_swiglu_and_then_down(draw, rank):
    gate_up, A = randn(0, T, 2 * I), randn(1, rank, I)
    before = gate_up.clone()
    wanted = swiglu(gate_up, C)
    lora_down_(wanted, A, INDEX, draw)
    X = swiglu_down(gate_up, C, A, INDEX, draw)
    assert X.equal(wanted) and gate_up.equal(before)
    gate, up = gate_up.chunk(2, dim=1)
    x = gate * torch.sigmoid(gate) * up
    close(X[:, :I], x)
    close(X[:, I : I + rank], (x * mask(draw)) @ A.t())
    assert (X[:, I + rank :] == 0).all()
