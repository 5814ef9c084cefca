"""RMSNorm against its formula under autograd, and against transformers' own in every dtype."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from megalora.ops.rms_norm import Rounding, add_rms_norm, rms_norm


def formula(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def inputs(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    return x.to(dtype).requires_grad_(), (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)


@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 8), (1, 1), (7, 1)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_value_and_gradient(shape, eps):
    x, weight = inputs(*shape)
    dy = torch.randn(shape, dtype=torch.float64)
    ours, theirs = rms_norm(x, weight, eps), formula(x, weight, eps)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    (a,), (b,) = (torch.autograd.grad(y, x, dy) for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x, weight = inputs(3, 6)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_transformers_in_low_precision(dtype):
    x, weight = inputs(6, 32, dtype=dtype)
    theirs = LlamaRMSNorm(32, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    ours = rms_norm(x, weight, 1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs(x))
    dy = torch.randn(6, 32).to(dtype)
    (a,), (b,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs(x), x, dy)
    assert a.dtype == dtype
    torch.testing.assert_close(a, b)


def test_the_sum_of_squares_does_not_overflow_float16():
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # 300^2 is more than float16 holds
    assert torch.equal(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_what_is_kept_for_backward():
    x, weight = inputs(50, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
    assert sum(kept) == x.numel() + weight.numel() + 50


# ---- room behind the result


@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 8)])
def test_room_is_left_behind_and_its_gradient_is_ignored(shape):
    (x, weight), size = inputs(*shape), shape[-1]
    dy = torch.randn(*shape[:-1], size + 5, dtype=torch.float64)
    wide, narrow = rms_norm(x, weight, 1e-5, 5), rms_norm(x, weight, 1e-5)
    assert wide.shape == dy.shape and wide[..., :size].equal(narrow)
    (a,), (b,) = torch.autograd.grad(wide, x, dy), torch.autograd.grad(narrow, x, dy[..., :size])
    assert a.equal(b)


def test_the_room_is_the_readers_to_fill():
    """Whoever reads the result writes there before backward: nothing that is kept may change by it."""
    x, weight = inputs(5, 12)
    (total, wide), narrow = add_rms_norm(x, x, weight, 1e-5, 4), formula(2 * x, weight, 1e-5)
    with torch.no_grad():
        wide[:, 12:] = float("nan")
    (a,) = torch.autograd.grad(total.sum() + wide[:, :12].square().sum(), x)
    (b,) = torch.autograd.grad(2 * x.sum() + narrow.square().sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- with the residual


def pair(*shape, dtype=torch.float64):
    x, weight = inputs(*shape, dtype=dtype)
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x, delta.to(dtype).requires_grad_(), weight


@pytest.mark.parametrize("room", [0, 8])
@pytest.mark.parametrize("read", ["both", "sum", "norm"])
def test_sum_and_norm_with_the_gradients_of_those_that_are_read(read, room):
    """The last layer's sum is read by nobody; a frozen norm's may be the only one that is."""
    x, delta, weight = pair(7, 12)
    total, y = add_rms_norm(x, delta, weight, 1e-5, room)
    assert y.shape == (7, 12 + room)
    ours, theirs = (total, y[:, :12]), (x + delta, formula(x + delta, weight, 1e-5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    chosen = {"both": slice(None), "sum": slice(1), "norm": slice(1, None)}[read]
    grads = [torch.randn(7, 12, dtype=torch.float64) for _ in range(2)][chosen]
    found, wanted = (torch.autograd.grad(side[chosen], (x, delta), grads) for side in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck_with_the_residual():
    x, delta, weight = pair(3, 6)
    assert torch.autograd.gradcheck(lambda x, delta: add_rms_norm(x, delta, weight, 1e-5), (x, delta))


def test_gradients_of_the_two_terms_can_be_changed_apart():
    """They are equal, but whoever accumulates into one must not change the other."""
    x, delta, weight = pair(3, 6)
    for _ in range(2):
        total, y = add_rms_norm(x, delta, weight, 1e-5)
        (total.sum() + y.square().sum()).backward()
    before = delta.grad.clone()
    x.grad.add_(1)
    assert delta.grad.equal(before) and not x.grad.equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_residual_in_low_precision_is_that_of_two_steps(dtype):
    x, delta, weight = pair(6, 32, dtype=dtype)
    total, y = add_rms_norm(x, delta, weight, 1e-5)
    separate = x + delta
    assert total.equal(separate) and y.equal(rms_norm(separate, weight, 1e-5)) and total.dtype == y.dtype == dtype
    grads = [torch.randn(6, 32).to(dtype) for _ in range(2)]
    (a, _) = torch.autograd.grad((total, y), (x, delta), grads)
    (b,) = torch.autograd.grad((separate, rms_norm(separate, weight, 1e-5)), (x,), grads)
    assert a.dtype == dtype
    torch.testing.assert_close(a, b)


def test_inputs_are_left_alone_and_what_is_kept_with_the_residual():
    x, delta, weight = pair(50, 64)
    before, kept = (x.detach().clone(), delta.detach().clone()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        total, y = add_rms_norm(x, delta, weight, 1e-6, 8)
    dtotal, dy = torch.randn_like(total), torch.randn_like(y)
    copies = dtotal.clone(), dy.clone()
    torch.autograd.grad((total, y), (x, delta), (dtotal, dy))
    assert sorted(kept) == sorted([x.numel(), weight.numel(), 50])
    assert x.equal(before[0]) and delta.equal(before[1]) and dtotal.equal(copies[0]) and dy.equal(copies[1])


ROUNDINGS = {"olmo2": (Olmo2RMSNorm, Rounding(precise=True)), "gemma": (Gemma2RMSNorm, Rounding(True, True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_other_roundings_are_those_of_transformers(name, dtype):
    (x, weight), (norm, rounding) = inputs(6, 32, dtype=dtype), ROUNDINGS[name]
    theirs = norm(32, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    ours, right = rms_norm(x, weight, 1e-5, rounding=rounding), theirs(x)
    assert ours.dtype == dtype
    few = 0 if dtype == torch.float32 else 2  # of 192: the mean is summed in another order
    assert (ours != right).sum() <= few if few else torch.allclose(ours, right, rtol=1e-6)
    dy = torch.randn(6, 32).to(dtype)
    (a,), (b,) = (torch.autograd.grad(y, x, dy) for y in (ours, right))
    torch.testing.assert_close(a, b, rtol=2e-2 if few else 1e-5, atol=1e-2 if few else 1e-5)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_gradcheck_with_a_residual_and_room(name):
    x, weight = inputs(3, 6)
    delta, rounding = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), ROUNDINGS[name][1]

    def both(x, delta):
        total, y = add_rms_norm(x, delta, weight, 1e-5, 8, rounding)
        return total, y[:, :6]

    assert torch.autograd.gradcheck(both, (x, delta))
