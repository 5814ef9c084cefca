"""The CUDA kernels against the torch references on the CPU, and against themselves: equal inputs, equal bits."""

from __future__ import annotations

import pytest
import torch

from megalora.ops import extension
from megalora.ops.cross_entropy import gradient_, statistics_
from megalora.ops.dropout import Dropout, dropout, dropout_add_
from megalora.ops.rms_norm import add_rms_norm, rms_norm
from megalora.ops.rope import split_rope
from megalora.ops.swiglu import swiglu

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def needs_the_kernels():
    if not extension.has_kernels("cuda"):
        pytest.skip("megalora's CUDA kernels are not built: make install with a CUDA toolkit")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(function, *inputs, room=0):
    """(outputs and input gradients) on the CPU in float64, and on the GPU in the inputs' dtype, twice."""
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", None), ("cuda", None)):
        leaves = [x.to(device=device, dtype=dtype or x.dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = tuple(y[..., : y.shape[-1] - room] if i == len(outputs) - 1 else y for i, y in enumerate(outputs))
        grads = [randn(*y.shape, seed=7 + i).to(device, y.dtype) for i, y in enumerate(outputs)]
        wide = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        results.append([*outputs, *(g for g in wide if g is not None)])
    for wanted, once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
        scale = wanted.abs().max()
        assert (once.double().cpu() - wanted).abs().max() <= TOLERANCE[once.dtype] * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 24])
def test_dropout_has_the_bits_of_the_cpu(dtype, offset):
    x, g, index = randn(37, 72, dtype=dtype), randn(37, 72, seed=1, dtype=dtype), torch.arange(37) * 5 + (1 << 33)
    spec = Dropout(p=0.3, seed=(1 << 40) + 5, site=9, step=3, feature_offset=offset)
    assert torch.equal(dropout(x.cuda(), index.cuda(), spec).cpu(), dropout(x, index, spec))
    ours = g.cuda()
    dropout_add_(ours, x.cuda(), index.cuda(), spec)
    dropout_add_(g, x, index, spec)
    assert torch.equal(ours.cpu(), g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 128, 576, 4096, 8192])
def test_rms_norm(dtype, size):
    x, delta = randn(13, size, dtype=dtype), randn(13, size, seed=1, dtype=dtype)
    weight = 1 + 0.1 * randn(size, seed=2, dtype=dtype)
    for room in (0, 64):
        both(lambda a, room=room: rms_norm(a, weight.to(a.device, a.dtype), 1e-5, room), x, room=room)
        both(lambda a, b, room=room: add_rms_norm(a, b, weight.to(a.device, a.dtype), 1e-5, room), x, delta, room=room)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [0, 64])
def test_swiglu(dtype, room):
    both(lambda x: swiglu(x, room), randn(19, 2 * 144, dtype=dtype), room=room)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (3, 3, 128), (5, 1, 80)])
def test_split_rope(dtype, heads, kv_heads, head_dim):
    angles = randn(11, head_dim // 2, seed=3)
    both(
        lambda x: split_rope(
            x, angles.cos().to(x.device, x.dtype), angles.sin().to(x.device, x.dtype), heads, kv_heads
        ),
        randn(11, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [40, 1000, 50_008])
def test_cross_entropy(dtype, vocab):
    logits, label = 3 * randn(9, vocab, dtype=dtype), torch.arange(9) * (vocab // 8) - 3
    exact, ours_logits = logits.double(), logits.cuda()
    wanted = statistics_(exact, label)
    ours = statistics_(ours_logits, label.cuda())
    torch.testing.assert_close(ours.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    probabilities = gradient_(exact, label, wanted[0], wanted[0], wanted[1])
    d = gradient_(ours_logits, label.cuda(), ours[0], ours[0], ours[1])
    assert (d.double().cpu() - probabilities).abs().max() <= TOLERANCE[dtype]
