"""The CUDA kernels against the torch references on the CPU, and against themselves: equal inputs, equal bits."""

from __future__ import annotations

import pytest
import torch

from megalora.ops import extension
from megalora.ops.attention import attention, pack
from megalora.ops.cross_entropy import LogitForm, gradient_, statistics_
from megalora.ops.dropout import Dropout, drop, dropout, dropout_add_, keep_mask
from megalora.ops.fused_norm import Addend, add_fused_norm
from megalora.ops.layer_norm import add_layer_norm, layer_norm, layer_weights
from megalora.ops.lora_linear import lora_down_, lora_down_input_grad_
from megalora.ops.rms_norm import LLAMA, Rounding, add_rms_norm, rms_norm
from megalora.ops.rope import split_rope
from megalora.ops.scaled_copy import scaled_copy_
from megalora.ops.swiglu import ACTS, swiglu, swiglu_backward

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


ROUNDINGS = {"llama": LLAMA, "olmo2": Rounding(precise=True), "gemma": Rounding(True, True)}


def plain(monkeypatch, function):
    """`function` by torch alone."""
    with monkeypatch.context() as patch:
        patch.setattr(extension, "has_kernels", lambda device_type: False)
        return function()


def assert_rounded_alike(ours, theirs):
    """The same but for what lies between two numbers of the dtype: few elements, and those by a step, or by two where
    they are rounded twice."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    a, b = ours.float(), theirs.float()
    assert ((a - b).abs() <= 2.02 * torch.finfo(ours.dtype).eps * b.abs()).all()
    assert (a != b).float().mean() <= 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [256, 3584, 16384])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_rms_norm_rounds_where_torch_does(monkeypatch, dtype, size, name):
    x, weight = randn(64, size, dtype=dtype).cuda(), (1 + 0.1 * randn(size, seed=2)).to("cuda", dtype)
    delta = randn(64, size, seed=1, dtype=dtype).cuda()
    (total, y), (wanted_total, wanted) = (
        run(lambda: add_rms_norm(x, delta, weight, 1e-6, 64, ROUNDINGS[name]))
        for run in (lambda f: f(), lambda f: plain(monkeypatch, f))
    )
    assert torch.equal(total, wanted_total)
    assert_rounded_alike(y[:, :size], wanted[:, :size])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ACTS)
def test_gates_round_where_torch_does(monkeypatch, dtype, act):
    gate_up = randn(64, 2 * 1408)
    gate_up[:, :1408].uniform_(-1, 8, generator=torch.Generator().manual_seed(1))  # below it torch's 1 + tanh cancels
    gate_up = gate_up.to("cuda", dtype)
    assert_rounded_alike(swiglu(gate_up, 0, act), plain(monkeypatch, lambda: swiglu(gate_up, 0, act)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_gates_of_any_size(dtype, act):
    """Where the activation is flat, and where exp would overflow or underflow."""
    gate = torch.tensor([0.0, -0.0, 1e-6, 20, -20, 88, -88, 104, -104, 1e4, -1e4, 3, -3, 0.5, -0.5, 7], dtype=dtype)
    x = torch.cat([gate, torch.ones_like(gate)])[None].cuda().requires_grad_()
    exact = x.detach().double().cpu().requires_grad_()
    y, wanted = swiglu(x, 0, act), swiglu(exact, 0, act)
    (grad,), (wanted_grad,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), exact)
    for a, b in ((y, wanted), (grad, wanted_grad)):
        torch.testing.assert_close(a.double().cpu(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 128, 576, 4096, 8192])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_rms_norm(dtype, size, name):
    how = ROUNDINGS[name]
    x, delta = randn(13, size, dtype=dtype), randn(13, size, seed=1, dtype=dtype)
    weight = 1 + 0.1 * randn(size, seed=2, dtype=dtype)
    for room in (0, 64):
        both(lambda a, room=room: rms_norm(a, weight.to(a.device, a.dtype), 1e-5, room, how), x, room=room)
        both(
            lambda a, b, room=room: add_rms_norm(a, b, weight.to(a.device, a.dtype), 1e-5, room, how),
            x, delta, room=room,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 128, 576, 4608, 16384])
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "1 + weight and bias", "none"])
def test_layer_norm(dtype, size, affine):
    offset = affine.startswith("1")
    weight = None if affine == "none" else (not offset) + 0.1 * randn(size, seed=2, dtype=dtype)
    bias = randn(size, seed=3, dtype=dtype) if "bias" in affine else None
    x, delta = randn(13, size, dtype=dtype) + 0.5, randn(13, size, seed=1, dtype=dtype)

    def of(a):
        return [None if one is None else one.to(a.device, a.dtype) for one in (weight, bias)]

    for room in (0, 64):
        both(lambda a, room=room: layer_norm(a, *of(a), 1e-5, room, offset), x, room=room)
        both(lambda a, b, room=room: add_layer_norm(a, b, *of(a), 1e-5, room, offset), x, delta, room=room)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 3584, 4608, 9216])
@pytest.mark.parametrize("name", [*ROUNDINGS, "layer"])
@pytest.mark.parametrize("scale, p", [(1.0, 0.3), (0.22, 0.0), (0.22, 0.3)])
@pytest.mark.parametrize("own", [False, True], ids=["delta", "norm of delta"])
def test_what_is_added_before_a_norm_has_the_bits_of_each_step(dtype, size, name, scale, p, own):
    """The fused pass against a norm, a scale, a dropout, a sum and a norm, one after another."""
    if own and name == "layer":
        pytest.skip("both are RMSNorms")
    x, delta, dtotal, dy = (randn(37, size, seed=i, dtype=dtype).cuda() for i in range(4))
    w, v = (1 + 0.1 * randn(size, seed=i).to("cuda", dtype) for i in (5, 6))
    index, draw = torch.arange(37, device="cuda") * 5 + (1 << 33), Dropout(p, seed=7, site=3, step=2) if p else None
    how = None if name == "layer" else ROUNDINGS[name]
    norm = layer_weights(w, v, 1e-5) if how is None else how.weights(w, 1e-5)
    addend = Addend(how.weights(v, 1e-6) if own else None, scale, index if p else None, draw)

    def in_turn(x, delta):
        added = rms_norm(delta, v, 1e-6, rounding=how) if own else delta
        added = drop(added * scale if scale != 1.0 else added, index, draw)
        return add_layer_norm(x, added, w, v, 1e-5) if how is None else add_rms_norm(x, added, w, 1e-5, rounding=how)

    results = []
    for function in (lambda a, b: add_fused_norm(a, b, norm, 0, addend), in_turn):
        leaves = [one.clone().requires_grad_() for one in (x, delta)]
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, [dtotal, dy])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [0, 64])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_swiglu(dtype, room, act, gated):
    both(lambda x: swiglu(x, room, act, gated), randn(19, 144 * (1 + gated), dtype=dtype), room=room)


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
@pytest.mark.parametrize("form", [LogitForm(), LogitForm(0.0625), LogitForm(1.0, 5.0), LogitForm(3.0, 30.0)])
def test_cross_entropy(dtype, vocab, form):
    """Also of what logits are made of: 3 s cut to 30, and 5 tanh(s / 5) where the slope is far from 1."""
    s, label = 3 * randn(9, vocab, dtype=dtype), torch.arange(9) * (vocab // 8) - 3
    s[0, :3], s[1, 5] = torch.tensor([3e4, -3e4, 0.0], dtype=dtype), 90.0
    exact, ours_logits = form.apply_(s.double()), s.cuda()
    factors = form.factors(exact)
    wanted = statistics_(exact, label)
    ours = statistics_(ours_logits, label.cuda(), form)
    torch.testing.assert_close(ours.cpu().double(), wanted, rtol=2e-5, atol=2e-5)
    gradient = gradient_(exact, label, wanted[0], wanted[0], wanted[1])
    for factor in factors:
        gradient.mul_(factor)
    d = gradient_(ours_logits, label.cuda(), ours[0], ours[0], ours[1], form)
    assert (d.double().cpu() - gradient).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_masked_logits(dtype):
    logits, label = randn(3, 1000, dtype=dtype), torch.tensor([0, 5, 700])
    logits[0, 64:640] = -torch.inf
    logits[1, [i for i in range(1000) if i != 5]] = -torch.inf
    wanted = torch.nn.functional.cross_entropy(logits.double(), label, reduction="none")
    ours = logits.cuda()
    maximum, total, target = statistics_(ours, label.cuda())
    torch.testing.assert_close((total.log() + maximum - target).double().cpu(), wanted, rtol=1e-5, atol=1e-5)
    assert gradient_(ours, label.cuda(), maximum, maximum, total).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("size, rank", [(136, 8), (1408, 16), (520, 48), (264, 136)])
@pytest.mark.parametrize("act", ACTS)
def test_swiglu_backward_with_the_term_of_a_branch(dtype, p, size, rank, act):
    """The fused pass has the bits of the term, then the backward pass, then the forward pass."""
    tokens = 77
    gate_up, A = randn(tokens, 2 * size, dtype=dtype).cuda(), randn(rank, size, seed=1, dtype=dtype).cuda()
    wide = randn(tokens, size + 64, seed=2, dtype=dtype).cuda()
    dz, index = randn(tokens, rank, seed=3, dtype=dtype).cuda(), torch.arange(tokens, device="cuda") * 3
    draw = Dropout(p, seed=5, site=1, step=2, feature_offset=8) if p else None
    apart = wide.clone()
    lora_down_input_grad_(apart[:, :size], dz, A, index, draw)
    wanted, none, _ = swiglu_backward(apart[:, :size], gate_up, None, act)
    assert none is None
    grad, x, scale = swiglu_backward(wide[:, :size], gate_up, (dz, A, index, draw), act)
    assert torch.equal(grad, wanted)
    kept = torch.ones_like(x, dtype=torch.bool) if draw is None else keep_mask(index, size, draw)
    assert torch.equal(x, torch.where(kept, swiglu(gate_up, 0, act), 0))
    assert scale == (1 if draw is None else draw.scale)
    into = torch.zeros(tokens, size, dtype=dtype, device="cuda")
    lora_down_input_grad_(wide[:, :size], dz, A, index, draw, into)
    assert torch.equal(into, apart[:, :size])
    X = torch.full((tokens, size + 192), float("nan"), device="cuda", dtype=dtype)
    lora_down_(X, A, index, draw, x)
    again = X.clone()
    lora_down_(again, A, index, draw)
    assert torch.equal(X[:, :size], x) and torch.equal(X, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_copy(dtype):
    shapes, matrix = [(5, 7), (64, 16), (300,), (1, 1)] * 10, torch.full((3000, 40), 2.0, device="cuda", dtype=dtype)
    before, row, copies = matrix.clone(), 0, []
    for i, shape in enumerate(shapes):
        source = randn(*shape, seed=i).cuda()
        if len(shape) == 1:
            out = torch.empty(shape, device="cuda", dtype=dtype)
        else:
            out = matrix[row : row + shape[0], 3 : 3 + shape[1]]
            before[row : row + shape[0], 3 : 3 + shape[1]] = source * (0.5 + i)
            row += shape[0]
        copies.append((out, source, 0.5 + i))
    scaled_copy_(copies)
    assert torch.equal(matrix, before)
    assert all(torch.equal(out, (source * scale).to(dtype)) for out, source, scale in copies)


@pytest.mark.parametrize("window", [None, 5, 48])
@pytest.mark.parametrize("lengths", [[64, 64], [50, 1, 70, 7], [3] * 40, [128]])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (3, 3, 128), (4, 1, 80)])
def test_attention_within_documents(lengths, window, heads, kv_heads, head_dim):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    shapes = [(bounds[-1], h, head_dim) for h in (heads, kv_heads, kv_heads)]
    exact = [randn(*shape, seed=i, dtype=torch.bfloat16).double().requires_grad_() for i, shape in enumerate(shapes)]
    leaves = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    d = randn(*shapes[0], seed=9, dtype=torch.bfloat16)
    packed = pack(bounds, head_dim, torch.bfloat16, torch.device("cuda"))
    assert packed is not None
    wanted = attention(*exact, bounds, window)
    ours = attention(*leaves, bounds, window, packed)
    wide = torch.empty(bounds[-1], heads * head_dim + 64, dtype=torch.bfloat16, device="cuda")  # as a linear leaves it
    wide[:, : heads * head_dim] = d.flatten(1)
    grads = torch.autograd.grad(ours, leaves, wide[:, : heads * head_dim].unflatten(1, (heads, head_dim)))
    for a, b in zip((ours, *grads), (wanted, *torch.autograd.grad(wanted, exact, d.double())), strict=True):
        assert (a.double().cpu() - b).norm() <= 2e-2 * b.norm()
