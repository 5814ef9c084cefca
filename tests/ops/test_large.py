"""Tensors of more than 2^31 elements, as long contexts make them: the last rows come out as they do alone."""

from __future__ import annotations

import pytest
import torch

from megalora.ops import extension
from megalora.ops.cross_entropy import gradient_, statistics_
from megalora.ops.dropout import Dropout, dropout, dropout_add_
from megalora.ops.lora_backward import UpBranch, add_down_weight_grad_, lora_backward_, swiglu_lora_backward_
from megalora.ops.lora_linear import lora_down_, lora_down_input_grad_
from megalora.ops.rms_norm import add_rms_norm, rms_norm
from megalora.ops.rope import split_rope
from megalora.ops.swiglu import swiglu, swiglu_backward, swiglu_down

DRAW, LAST, RANK, ROOM = Dropout(0.1, seed=1, site=2, step=3), 1000, 16, 64

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_a_large_gpu():
    if not extension.has_kernels("cuda"):
        pytest.skip("megalora's CUDA kernels are not built: make install with a CUDA toolkit")
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("40 GiB of GPU memory must be free")


def rows_of(columns: int) -> int:
    return 2**31 // columns + 2 * LAST


def large(columns: int, rows: int | None = None) -> torch.Tensor:
    """Zeros but for the last rows, which are random."""
    x = torch.zeros(rows or rows_of(columns), columns, dtype=torch.bfloat16, device="cuda")
    x[-LAST:].normal_()
    return x


def small(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def index_of(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x), device="cuda")


def assert_ends_alike(whole, end, columns: slice = slice(None)) -> None:
    assert torch.equal(whole[-LAST:, columns], end[:, columns])


def assert_z_alike(whole, end) -> None:
    """Few tokens share features among more blocks: sums in another order, rounded to bfloat16."""
    assert (whole.float() - end.float()).abs().max() <= 2**-7 * end.abs().max()
    assert not whole[:, RANK:].any() and whole[:, :RANK].any()


def test_norms():
    x, weight = large(4096), small(4096)
    assert_ends_alike(rms_norm(x, weight, 1e-5, ROOM), rms_norm(x[-LAST:], weight, 1e-5, ROOM), slice(4096))
    for whole, end in zip(add_rms_norm(x, x, weight, 1e-5), add_rms_norm(*[x[-LAST:]] * 2, weight, 1e-5), strict=True):
        assert_ends_alike(whole, end)


def test_norms_backward():
    x, weight = large(4096), small(4096)
    grads = []
    for leaf in (x.requires_grad_(), x.detach()[-LAST:].clone().requires_grad_()):
        y = rms_norm(leaf, weight, 1e-5)
        (grad,) = torch.autograd.grad(y, leaf, y.detach())
        del y
        grads.append(grad)
    assert_ends_alike(*grads)


def test_rotation():
    qkv = large(6144)
    cos, sin = (small(len(qkv), 64) for _ in range(2))
    ends = split_rope(qkv[-LAST:], cos[-LAST:], sin[-LAST:], 32, 8)
    wholes = split_rope(qkv, cos, sin, 32, 8)
    for whole, end in zip(wholes, ends, strict=True):
        assert_ends_alike(whole, end)


def test_swiglu():
    gate_up, A = large(28672), small(RANK, 14336)
    index = index_of(gate_up)
    end = gate_up[-LAST:].clone()
    assert_ends_alike(swiglu(gate_up), swiglu(end))
    whole, alone = (swiglu_down(x, ROOM, A, i, DRAW) for x, i in ((gate_up, index), (end, index[-LAST:])))
    assert_ends_alike(whole, alone, slice(14336))
    assert_z_alike(whole[-LAST:, 14336:], alone[:, 14336:])
    del whole
    dy = large(14336, len(gate_up))
    assert_ends_alike(swiglu_backward(dy, gate_up, None)[0], swiglu_backward(dy[-LAST:].clone(), end, None)[0])


def test_swiglu_with_its_branches_backward():
    gate_up, A = large(28672), small(RANK, 14336)
    dX, z = large(14336 + ROOM, len(gate_up)), large(2 * RANK, len(gate_up))
    index = index_of(gate_up)
    results = []
    for part in (slice(None), slice(-LAST, None)):
        dA, dB = torch.zeros(RANK, 14336, device="cuda"), [torch.zeros(14336, RANK, device="cuda") for _ in range(2)]
        ups = [
            UpBranch(slice(i * 14336, (i + 1) * 14336), z[part, i * RANK : (i + 1) * RANK], 2.0, dB[i])
            for i in range(2)
        ]
        dx, dz = dX[part].clone()[:, :14336], dX[part, 14336 : 14336 + RANK]
        grad = swiglu_lora_backward_(dx, gate_up[part], dz, A, index[part], DRAW, dA, ups)
        results.append((grad[-LAST:].clone(), dA, *dB))
        del grad, dx
    for whole, end in zip(*results, strict=True):
        torch.testing.assert_close(whole, end, rtol=1e-4, atol=1e-3)


def test_a_branch():
    X, A = large(4096 + ROOM), small(RANK, 4096)
    index = index_of(X)
    X_end, i_end = X[-LAST:].clone(), index[-LAST:]
    lora_down_(X, A, index, DRAW)
    lora_down_(X_end, A, i_end, DRAW)
    assert_ends_alike(X, X_end, slice(4096))
    assert_z_alike(X[-LAST:, 4096:], X_end[:, 4096:])
    dX = large(4096 + ROOM)
    dx, dz, x = dX[:, :4096], dX[:, 4096 : 4096 + RANK], X[:, :4096]
    end = dX[-LAST:].clone()
    grads = torch.zeros(3, RANK, 4096, device="cuda")
    add_down_weight_grad_([grads[0]], dz, x, index, DRAW)
    lora_down_input_grad_(end[:, :4096], end[:, 4096 : 4096 + RANK], A, i_end, DRAW)
    once = dX[-LAST:].clone()
    lora_backward_(dx, dz, x, A, index, DRAW, [grads[1]])
    assert_ends_alike(dx, end[:, :4096])
    lora_backward_(once[:, :4096], once[:, 4096 : 4096 + RANK], x[-LAST:], A, i_end, DRAW, [grads[2]])
    for grad in grads[:2]:
        torch.testing.assert_close(grad, grads[2], rtol=1e-4, atol=1e-3)


def test_masks():
    x = large(4096)
    index = index_of(x)
    assert_ends_alike(dropout(x, index, DRAW), dropout(x[-LAST:], index[-LAST:], DRAW))
    out, end = x.clone(), x[-LAST:].clone()
    dropout_add_(out, x, index, DRAW)
    dropout_add_(end, x[-LAST:].clone(), index[-LAST:], DRAW)
    assert_ends_alike(out, end)


def test_losses():
    logits = large(128256)
    label = torch.arange(len(logits), device="cuda") % 128256
    end = logits[-LAST:].clone()
    stats, alone = statistics_(logits, label), statistics_(end, label[-LAST:])
    assert torch.equal(stats[:, -LAST:], alone)
    gradient_(logits, label, stats[0], stats[0], stats[1])
    gradient_(end, label[-LAST:], alone[0], alone[0], alone[1])
    assert_ends_alike(logits, end)
