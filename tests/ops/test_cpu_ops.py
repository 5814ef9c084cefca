"""The C++ kernels of a step's elementwise ops: against the plain torch references in float64, and the same bits on any
number of threads."""

import pytest
import torch

from megalora.ops import extension
from megalora.ops.cross_entropy import gradient_, statistics_
from megalora.ops.rms_norm import LLAMA, Rounding, add_rms_norm, rms_norm
from megalora.ops.rope import split_rope
from megalora.ops.swiglu import swiglu

pytestmark = pytest.mark.skipif(not extension.has_kernels("cpu"), reason="no megalora._C: " + extension.REMEDY)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
# Relative to the largest element; bfloat16 is rounded up to three times on the way, as in HF.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.5e-2}
ROOMS = pytest.mark.parametrize("room", [0, 8, 3])


def randn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_and_gradients(function, inputs, room):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = (*outputs[:-1], outputs[-1][..., : outputs[-1].shape[-1] - room])
    grads = [randn(*y.shape, seed=7 + i).to(y.dtype) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def check(monkeypatch, function, inputs, dtype, room=0):
    """`function` of the inputs in dtype, on 1, 2 and 5 threads, against the reference in float64."""
    rounded = [x.to(dtype) for x in inputs]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(function, rounded, room))
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr(extension, "has_kernels", lambda device_type: False)
        wanted = outputs_and_gradients(function, [x.double() for x in rounded], room)
    for found in results:
        assert all(a.equal(b) for a, b in zip(found, results[0], strict=True))
    for a, b in zip(results[0], wanted, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).abs().max() <= ROUNDING[dtype] * b.abs().max().clamp(min=1)


@DTYPES
@ROOMS
@pytest.mark.parametrize("shape", [(300, 576), (33, 40), (2, 31), (1, 1)])
@pytest.mark.parametrize("how", [LLAMA, Rounding(precise=True), Rounding(True, True)], ids=["llama", "olmo2", "gemma"])
def test_rms_norm(monkeypatch, dtype, room, shape, how):
    x, delta, weight = randn(*shape), randn(*shape, seed=1), 1 + 0.1 * randn(shape[1], seed=2)
    weight = weight.to(dtype).double()  # so that the reference has the same
    check(monkeypatch, lambda a: rms_norm(a, weight.to(a.dtype), 1e-5, room, how), [x], dtype, room)
    check(monkeypatch, lambda a, b: add_rms_norm(a, b, weight.to(a.dtype), 1e-5, room, how), [x, delta], dtype, room)


@DTYPES
@ROOMS
@pytest.mark.parametrize("shape", [(200, 2 * 160), (7, 2 * 37), (1, 2)])
def test_swiglu(monkeypatch, dtype, room, shape):
    check(monkeypatch, lambda x: swiglu(x, room), [randn(*shape, scale=3)], dtype, room)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swiglu_of_gates_of_any_size(dtype):
    """Where silu is flat, and where exp would overflow or underflow."""
    gate = torch.tensor([0.0, -0.0, 1e-30, 20, -20, 88, -86.9, -87.1, -88.8, 104, -104, 1e4, -1e4], dtype=dtype)
    gate = torch.cat([gate, torch.linspace(-90, 90, 1001, dtype=dtype)])
    x = torch.cat([gate, torch.ones_like(gate)])[None].requires_grad_()
    y = swiglu(x)
    exact = gate.double().requires_grad_()
    wanted = torch.nn.functional.silu(exact)
    tolerance = {"rtol": 1e-14, "atol": 0} if dtype == torch.float64 else {"rtol": 5e-7, "atol": 1e-35}
    torch.testing.assert_close(y[0].double(), wanted, **tolerance)
    (grad,), (wanted_grad,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), exact)
    scale = 1e-14 if dtype == torch.float64 else 6e-7
    torch.testing.assert_close(grad[0, : len(gate)].double(), wanted_grad, rtol=scale, atol=scale)
    assert not grad.isnan().any()


@DTYPES
@pytest.mark.parametrize("heads, kv_heads, dim", [(9, 3, 64), (4, 4, 10), (1, 2, 2)])
def test_split_rope(monkeypatch, dtype, heads, kv_heads, dim):
    angles = randn(70, dim // 2, seed=3)
    cos, sin = ((1.3 * table).to(dtype).double() for table in (angles.cos(), angles.sin()))
    check(
        monkeypatch,
        lambda x: split_rope(x, cos.to(x.dtype), sin.to(x.dtype), heads, kv_heads),
        [randn(70, (heads + 2 * kv_heads) * dim)],
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("vocab", [1, 31, 1000, 5003])
def test_cross_entropy(dtype, vocab):
    rows = 21
    logits, label = randn(rows, vocab, scale=4).to(dtype), torch.arange(rows) * (vocab // 16 + 1) - 2
    mine = (label >= 0) & (label < vocab)
    exact = logits.double()
    maximum, total = exact.amax(-1), (exact - exact.amax(-1, keepdim=True)).exp().sum(-1)
    target = torch.where(mine, exact.gather(1, label.clamp(0, vocab - 1)[:, None])[:, 0], 0.0)
    onehot = torch.nn.functional.one_hot(label.clamp(0, vocab - 1), vocab) * mine[:, None]
    wanted = exact.softmax(-1) - onehot
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            copy = logits.clone()
            stats = statistics_(copy, label)
            results.append((stats, gradient_(copy, label, stats[0], stats[0], stats[1])))
    finally:
        torch.set_num_threads(threads)
    stats, grad = results[0]
    assert all(a.equal(stats) and b.equal(grad) for a, b in results)
    assert stats[0].double().equal(maximum) and stats[2].double().equal(target)
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(stats[1].double(), total, rtol=rounding, atol=0)
    torch.testing.assert_close(grad.double(), wanted, rtol=max(rounding, ROUNDING[dtype]), atol=rounding)


def test_cross_entropy_where_nothing_but_one_counts():
    logits = torch.full((2, 100), -float("inf"))
    logits[0, 3], logits[1, 7] = 5.0, -2e38
    label = torch.tensor([3, 8])
    stats = statistics_(logits, label)
    assert stats.tolist() == [[5.0, torch.tensor(-2e38).item()], [1.0, 1.0], [5.0, -float("inf")]]
    grad = gradient_(logits, label, stats[0], stats[0], stats[1])
    wanted = torch.zeros(2, 100)
    wanted[1, 7], wanted[1, 8] = 1, -1
    assert grad.equal(wanted)


def arguments():
    """One call of every op."""
    x, row, weight, inverse = randn(5, 12), randn(5, 12, seed=1), randn(12), randn(5).abs()
    qkv, tables = randn(5, 4 * 12), (randn(5, 6), randn(5, 6, seed=1))
    heads = randn(5, 2, 12), randn(5, 1, 12), randn(5, 1, 12)
    label = torch.arange(5)
    return {
        "rms_norm_": (x, row, weight, 1e-5, torch.empty_like(x), torch.empty_like(x), inverse),
        "rms_norm_backward_": (row, x, weight, inverse, row, torch.empty_like(x)),
        "swiglu_": (randn(5, 24), x),
        "swiglu_backward_": (x, randn(5, 24), randn(5, 24)),
        "split_rope_": (qkv, *tables, *heads),
        "split_rope_backward_": (*heads, *tables, qkv),
        "cross_entropy_stats_": (x, label, torch.empty(3, 5, dtype=torch.float64)),
        "cross_entropy_grad_": (x, label, inverse, inverse),
    }


@pytest.mark.parametrize("name", arguments())
def test_ops_are_well_registered(name):
    torch.library.opcheck(getattr(torch.ops.megalora, name).default, arguments()[name])


@pytest.mark.parametrize("name", arguments())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ops_quote_the_condition_that_fails(name, dtype):
    """One argument of another type than the rest, or all of one that has no kernel."""
    found = list(arguments()[name])
    floats = [i for i, a in enumerate(found) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for i in floats if dtype == torch.float16 else floats[:1]:
        found[i] = found[i].to(dtype)
    with pytest.raises(RuntimeError, match=r"megalora: .*(does not hold|no CPU kernel)"):
        getattr(torch.ops.megalora, name)(*found)


def test_roundings_and_gates_that_a_kernel_does_not_know_are_refused():
    x, weight, inverse, out = randn(5, 12), randn(12), randn(5).abs(), torch.empty(5, 12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="give 1 . w"):  # rounded before the weight: 1 + w is the caller's
        torch.ops.megalora.rms_norm_(x, None, weight, 1e-5, None, out, inverse, False, True)
    for gate in ("relu", "gelu_tanh"):  # the one is none, the other a GPU's alone
        with pytest.raises(RuntimeError, match=gate):
            torch.ops.megalora.swiglu_(randn(5, 24), out, gate)


def test_float16_has_the_references():
    x = randn(4, 24).half()
    assert swiglu(x).dtype == torch.float16 and rms_norm(x, torch.ones(24).half(), 1e-5).dtype == torch.float16
