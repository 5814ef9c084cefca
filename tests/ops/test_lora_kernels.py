"""The CUDA kernels of a LoRA branch against float64: values to rounding, masks and untouched places to the bit."""

import pytest
import torch

from megalora.ops import extension, limits
from megalora.ops.dropout import Dropout, keep_mask
from megalora.ops.swiglu import ACTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not extension.has_kernels("cuda"), reason="megalora._C has no CUDA kernels here"),
]

HALF_TYPES = [torch.bfloat16, torch.float16]
# (tokens, features, rank, p): ragged in each dimension, each size of kernel, each side of the thresholds
SHAPES = [
    (1, 8, 8, 0.1),
    (17, 40, 8, 0.1),
    (300, 200, 24, 0.3),
    (129, 1032, 48, 0.05),
    (515, 328, 72, 0.5),
    (1000, 520, 136, 0.9),
    (257, 4096, 192, 0.1),
    (2048, 1024, 64, 0.0),
    (640, 256, 32, 0.0),
]


class Case:
    """x, z and dx, dz lie side by side in wider rows, as a layer keeps them."""

    def __init__(self, tokens, features, rank, p, dtype):
        torch.manual_seed(tokens + features + rank)
        columns = -(-rank // 64) * 64
        self.rank, self.features, self.dtype = rank, features, dtype
        self.spec = Dropout(p, seed=1 << 40 | 99, site=7, step=3, feature_offset=16)
        self.tokens = (torch.arange(tokens, device="cuda") + (5 << 32) - 7).flip(0).contiguous()
        self.keep = keep_mask(self.tokens, features, self.spec)
        self.forward = torch.randn(tokens, features + columns, device="cuda").to(dtype)
        self.x, self.z = self.forward[:, :features], self.forward[:, features:]
        self.A = torch.randn(rank, features, device="cuda").to(dtype)
        self.backward = torch.randn(tokens, features + columns, device="cuda").to(dtype)
        self.dx, self.dz = self.backward[:, :features], self.backward[:, features : features + rank]

    @property
    def draw(self):
        return self.tokens, self.spec.key, self.spec.site, self.spec.step, self.spec.feature_offset, self.spec.p

    def dropped_x(self):
        return torch.where(self.keep, self.x.double() * self.spec.scale, 0.0)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.fixture(params=HALF_TYPES, ids=str)
def case(request, shape):
    return Case(*shape, request.param)


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def rounding(dtype):
    return 0.6 * torch.finfo(dtype).eps


def test_down(case):
    case.z.fill_(float("nan"))
    expected = case.dropped_x() @ case.A.double().t()
    case.x.masked_fill_(~case.keep, float("nan"))  # what is dropped is 0, whatever it was
    torch.ops.megalora.lora_down_(case.z, case.x, case.A, *case.draw)
    assert error(case.z[:, : case.rank], expected) < rounding(case.dtype)
    assert (case.z[:, case.rank :] == 0).all()


def test_down_weight_grad(case):
    expected = case.dz.double().t() @ case.dropped_x()
    case.x.masked_fill_(~case.keep, float("nan"))
    got = torch.ops.megalora.lora_down_weight_grad(case.dz, case.x, *case.draw)
    assert got.dtype == torch.float32 and error(got, expected) < 1e-5


def test_down_input_grad(case):
    before = case.backward.clone()
    term = case.spec.scale * (case.dz.double() @ case.A.double())
    torch.ops.megalora.lora_down_input_grad_(case.dx, case.dz, case.A, *case.draw)
    expected = before[:, : case.features].double() + torch.where(case.keep, term, 0.0)
    assert error(case.dx, expected) < rounding(case.dtype)
    assert torch.equal(case.dx[~case.keep], before[:, : case.features][~case.keep])
    assert torch.equal(case.backward[:, case.features :], before[:, case.features :])


def test_up_weight_grad(case):
    got = torch.ops.megalora.lora_up_weight_grad(case.x, case.dz, 0.25)
    expected = 0.25 * case.x.double().t() @ case.dz.double()
    assert got.dtype == torch.float32 and error(got, expected) < 1e-5


# ---- the backward pass in one go


def parts_of(rank: int) -> list[int]:
    """Of several branches, in eights."""
    return [8] * (rank // 8) if rank <= 32 else [24, rank - 24]


@pytest.mark.parametrize("apart", [False, True], ids=["in place", "apart"])
def test_backward(case, apart):
    if case.rank > limits.LARGEST_RANK_BACKWARD:
        pytest.skip("larger ranks go through two kernels")
    term = case.spec.scale * (case.dz.double() @ case.A.double())
    wanted = case.dx.double() + torch.where(case.keep, term, 0.0)
    wanted_dA = 1.0 + case.dz.double().t() @ case.dropped_x()
    before, untouched = case.dx.clone(), case.backward[:, case.features :].clone()
    case.x.masked_fill_(~case.keep, float("nan"))
    dA = [torch.ones(r, case.features, device="cuda") for r in parts_of(case.rank)]
    out = torch.full_like(before, float("nan")) if apart else case.dx
    arguments = (case.dx, case.dz, case.x, case.A, *case.draw, None, dA, out if apart else None)
    torch.ops.megalora.lora_backward_(*arguments)
    assert error(out, wanted) < rounding(case.dtype)
    assert torch.equal(out[~case.keep], before[~case.keep])
    assert torch.equal(case.backward[:, case.features :], untouched)
    assert not apart or torch.equal(case.dx, before)
    assert error(torch.cat(dA), wanted_dA) < 1e-5


GATED = [  # (tokens, features, rank of down, ranks of gate and up, of both in one linear, or none; p)
    (1, 8, 8, (8, 8), 0.1),
    (17, 40, 8, (), 0.1),
    (300, 200, 16, (16, 8), 0.3),
    (129, 1032, 16, (8, 16), 0.0),
    (2100, 1408, 16, (16, 16), 0.1),
    (515, 328, 8, (), 0.5),
    (300, 200, 8, (16,), 0.3),
    (2100, 1408, 16, (8,), 0.1),
]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("tokens, features, rank, ups, p", GATED)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
def test_gated_backward_and_forward(tokens, features, rank, ups, p, act, dtype, gated):
    """The kernels that make x = act(gate) * up, or act(up), themselves, against float64 of x as bits have it."""
    if len(ups) > 1 + gated:
        pytest.skip("one branch alone without a gate")
    case = Case(tokens, features, rank, p, dtype)
    gate_up = torch.randn(tokens, (1 + gated) * features, device="cuda").to(dtype)
    gate, *more = gate_up.double().split(features, dim=1)
    up = more[0] if gated else 1.0
    value = ACTS[act].value(gate).to(dtype).double()
    case.x.copy_((value * up).to(dtype))
    x, X = case.dropped_x(), torch.full_like(case.forward, float("nan"))
    torch.ops.megalora.swiglu_lora_down_(X[:, features:], gate_up, case.A, *case.draw, None, X[:, :features], act)
    assert error(X[:, :features], (value * up)) < 2 * rounding(dtype)  # the value is rounded from float32, not float64
    assert error(X[:, features : features + rank], x @ case.A.double().t()) < 3 * rounding(dtype)
    assert (X[:, features + rank :] == 0).all()

    term = case.spec.scale * (case.dz.double() @ case.A.double())
    d = (case.dx.double() + torch.where(case.keep, term, 0.0)).to(dtype).double()
    leaf = gate.clone().requires_grad_()
    exact = ACTS[act].value(leaf)
    (dgate,) = torch.autograd.grad(exact, leaf, d * up)
    wanted = torch.cat([dgate, d * exact.detach()], dim=1) if gated else dgate
    grad, dA = torch.full_like(gate_up, float("nan")), torch.ones(rank, features, device="cuda")
    z = torch.randn(tokens, 64, device="cuda").to(dtype)
    parts = grad.shape[1] // max(1, len(ups))
    dB, scaling = [torch.ones(parts, r, device="cuda") for r in ups], [0.5, 3.0][: len(ups)]
    places = (grad, [dA], z if ups else None, dB, scaling, act)
    torch.ops.megalora.swiglu_lora_gradients_(case.dx, gate_up, case.dz, case.A, *case.draw, None, *places)
    assert error(grad, wanted) < 2 * rounding(dtype)
    assert error(dA, 1.0 + case.dz.double().t() @ x) < 2 * rounding(dtype)
    first = 0
    for made, rows, scale in zip(dB, grad.double().split(parts, dim=1), scaling, strict=False):
        r = made.shape[1]
        assert error(made, 1.0 + scale * rows.t() @ z[:, first : first + r].double()) < 1e-5
        first += r


def test_mask_bits_are_those_of_the_definition():
    case = Case(96, 512, 8, 0.37, torch.bfloat16)
    ones, unit = torch.ones(96, 8, device="cuda").bfloat16(), torch.zeros(8, 512, device="cuda").bfloat16()
    unit[0] = 1
    case.dx.zero_()
    torch.ops.megalora.lora_down_input_grad_(case.dx, ones, unit, *case.draw)
    assert torch.equal(case.dx != 0, case.keep)


@pytest.mark.parametrize("rank", [16, 32, 48])
@pytest.mark.parametrize("parts", [0, 1, 2], ids=["x read", "x made of up", "x made of gate and up"])
def test_twenty_repeats_of_the_backward_pass_give_the_same_bits(rank, parts):
    if parts and rank > 16:
        pytest.skip("larger ranks go through other kernels")
    case = Case(2048, 4096, rank, 0.1, torch.bfloat16)
    gate_up = torch.randn(2048, 4096 * parts, device="cuda").bfloat16()
    z = torch.randn(2048, 64, device="cuda").bfloat16()

    def run():
        dA = torch.zeros(rank, 4096, device="cuda")
        if not parts:
            out = torch.empty_like(case.dx)
            torch.ops.megalora.lora_backward_(case.dx, case.dz, case.x, case.A, *case.draw, None, [dA], out)
            return out, dA
        grad, dB = torch.empty_like(gate_up), [torch.zeros(4096, 16, device="cuda") for _ in range(parts)]
        torch.ops.megalora.swiglu_lora_gradients_(
            case.dx, gate_up, case.dz, case.A, *case.draw, None, grad, [dA], z, dB, [1.0, 2.0][:parts]
        )
        X = torch.empty_like(case.forward)
        torch.ops.megalora.swiglu_lora_down_(X[:, 4096:], gate_up, case.A, *case.draw, None, X[:, :4096])
        return grad, dA, *dB, X

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("rank, p", [(16, 0.1), (64, 0.05), (128, 0.05), (192, 0.0)])
def test_twenty_repeats_give_the_same_bits(rank, p):
    case = Case(2048, 4096, rank, p, torch.bfloat16)
    dx = case.dx.clone()

    def run():
        z, out = torch.empty_like(case.z), dx.clone()
        torch.ops.megalora.lora_down_(z, case.x, case.A, *case.draw)
        torch.ops.megalora.lora_down_input_grad_(out, case.dz, case.A, *case.draw)
        grads = torch.ops.megalora.lora_down_weight_grad(case.dz, case.x, *case.draw)
        return z, out, grads, torch.ops.megalora.lora_up_weight_grad(case.x, case.dz, 2.0)

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_no_tokens_give_zero_gradients():
    case = Case(0, 64, 16, 0.1, torch.bfloat16)
    torch.ops.megalora.lora_down_(case.z, case.x, case.A, *case.draw)
    torch.ops.megalora.lora_down_input_grad_(case.dx, case.dz, case.A, *case.draw)
    assert (torch.ops.megalora.lora_down_weight_grad(case.dz, case.x, *case.draw) == 0).all()
    assert (torch.ops.megalora.lora_up_weight_grad(case.x, case.dz, 1.0) == 0).all()


def test_ops_are_well_registered():
    case = Case(32, 64, 16, 0.1, torch.bfloat16)
    x, dz = case.x.contiguous(), case.dz.contiguous()
    ops = torch.ops.megalora
    torch.library.opcheck(ops.lora_down_.default, (torch.empty_like(dz), x, case.A, *case.draw))
    torch.library.opcheck(ops.lora_down_weight_grad.default, (dz, x, *case.draw))
    torch.library.opcheck(ops.lora_down_input_grad_.default, (case.dx.contiguous(), dz, case.A, *case.draw))
    torch.library.opcheck(ops.lora_up_weight_grad.default, (x, dz, 0.5))
    dA, gate_up = torch.zeros(16, 64, device="cuda"), torch.randn(32, 128, device="cuda").bfloat16()
    dx, dB = case.dx.contiguous(), [torch.zeros(64, 16, device="cuda") for _ in range(2)]
    torch.library.opcheck(ops.lora_backward_.default, (dx, dz, x, case.A, *case.draw, None, [dA]))
    torch.library.opcheck(ops.swiglu_lora_down_.default, (torch.empty_like(dz), gate_up, case.A, *case.draw, None, x))
    arguments = (dx, gate_up, dz, case.A, *case.draw, None, torch.empty_like(gate_up), [dA])
    z = torch.randn(32, 32, device="cuda").bfloat16()
    torch.library.opcheck(ops.swiglu_lora_gradients_.default, (*arguments, z, dB, [1.0, 2.0]))


@pytest.mark.parametrize(
    "change, condition",
    [
        (lambda c: (c.dz, c.x.float()), "m.scalar_type() == at::kBFloat16"),
        (lambda c: (c.dz, c.x[:, 1:9]), "% kAlignment == 0"),
        (lambda c: (c.dz[:, :4], c.x), "m.size(1) % kOctet == 0"),
        (lambda c: (c.dz[:-1], c.x), "dz_TR.size(0) == x_TK.size(0)"),
        (lambda c: (c.x.repeat(1, 4), c.x), "rank <= kLargestRank"),
    ],
)
def test_op_quotes_the_condition_that_fails(change, condition):
    case = Case(32, 64, 16, 0.1, torch.bfloat16)
    with pytest.raises(RuntimeError) as raised:
        torch.ops.megalora.lora_down_weight_grad(*change(case), *case.draw)
    assert condition in str(raised.value)
