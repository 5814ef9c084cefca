"""The C++ kernels of a LoRA branch on the CPU against float64: values to rounding, masks and untouched places to the
bit, and the same bits on any number of threads."""

import pytest
import torch

from megalora.ops import extension
from megalora.ops.dropout import Dropout, keep_mask

pytestmark = pytest.mark.skipif(not extension.has_kernels("cpu"), reason="no megalora._C: " + extension.REMEDY)

# (tokens, features, rank, p, feature_offset): ragged in each dimension, on each side of the tiles of the kernels
SHAPES = [
    (1, 1, 1, 0.1, 0),
    (17, 40, 8, 0.1, 0),
    (300, 200, 5, 0.3, 3),
    (129, 1032, 6, 0.05, 16),
    (40, 511, 13, 0.9, 21),
    (1100, 520, 16, 0.1, 8),
    (64, 576, 64, 0.0, 0),
]
# Relative error of the norm; sums are in float32 for bfloat16 too, and z and dx are rounded to it once.
ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3}
ops = torch.ops.megalora


class Case:
    """x and z, dx and dz lie side by side in wider rows, as a layer keeps them."""

    def __init__(self, shape, dtype):
        tokens, features, rank, p, offset = shape
        columns = -(-rank // 8) * 8
        generator = torch.Generator().manual_seed(sum(shape[:3]))

        def randn(*sizes):
            return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

        self.features, self.rank, self.dtype = features, rank, dtype
        self.spec = Dropout(p, seed=1 << 40 | 99, site=7, step=3, feature_offset=offset)
        self.tokens = (torch.arange(tokens) + (5 << 32) - 7).flip(0).contiguous()
        self.keep = keep_mask(self.tokens, features, self.spec)
        self.forward, self.backward = randn(tokens, features + columns), randn(tokens, features + columns)
        self.x, self.z = self.forward[:, :features], self.forward[:, features:]
        self.dx, self.dz = self.backward[:, :features], self.backward[:, features : features + rank]
        self.A = randn(rank, features)

    @property
    def draw(self):
        return self.tokens, self.spec.key, self.spec.site, self.spec.step, self.spec.feature_offset, self.spec.p

    def dropped_x(self):
        return torch.where(self.keep, self.x.double() * self.spec.scale, 0.0)

    def close(self, found, wanted, error=None):
        error = ERROR[self.dtype] if error is None else error
        assert (found.double() - wanted).norm() <= error * wanted.norm().clamp(min=1)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def case(request, shape):
    return Case(shape, request.param)


def on_threads(*counts):
    """Runs what follows on each number of threads in turn."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


def test_down(case):
    wanted = case.dropped_x() @ case.A.double().t()
    case.x.masked_fill_(~case.keep, float("nan"))  # what is dropped is 0, whatever it was
    before, results = case.x.clone(), []
    for _ in on_threads(1, 2, 5):
        case.z.fill_(float("nan"))
        ops.lora_down_(case.z, case.x, case.A, *case.draw)
        results.append(case.z.clone())
    assert all(z.equal(results[0]) for z in results)
    case.close(results[0][:, : case.rank], wanted)
    assert (results[0][:, case.rank :] == 0).all() and case.x.isnan().equal(before.isnan())


def test_down_weight_grad(case):
    wanted = case.dz.double().t() @ case.dropped_x()
    case.x.masked_fill_(~case.keep, float("nan"))
    results = [ops.lora_down_weight_grad(case.dz, case.x, *case.draw) for _ in on_threads(1, 2, 5)]
    assert results[0].dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert all(dA.equal(results[0]) for dA in results)
    case.close(results[0], wanted, 1e-14 if case.dtype == torch.float64 else 1e-6)


def test_down_input_grad(case):
    before, results = case.backward.clone(), []
    term = case.spec.scale * (case.dz.double() @ case.A.double())
    for _ in on_threads(1, 2, 5):
        case.backward.copy_(before)
        ops.lora_down_input_grad_(case.dx, case.dz, case.A, *case.draw)
        results.append(case.backward.clone())
    assert all(backward.equal(results[0]) for backward in results)
    old = before[:, : case.features]
    case.close(case.dx, old.double() + torch.where(case.keep, term, 0.0))
    assert case.dx[~case.keep].equal(old[~case.keep])
    assert case.backward[:, case.features :].equal(before[:, case.features :])


def test_up_weight_grad(case):
    results = [ops.lora_up_weight_grad(case.x, case.dz, 0.25) for _ in on_threads(1, 2, 5)]
    assert all(dB.equal(results[0]) and dB.is_contiguous() for dB in results)
    error = 1e-14 if case.dtype == torch.float64 else 1e-6
    case.close(results[0], 0.25 * case.x.double().t() @ case.dz.double(), error)


def test_mask_bits_are_those_of_the_definition():
    case = Case((96, 600, 8, 0.37, 5), torch.float32)
    unit = torch.zeros(8, 600)
    unit[0] = 1
    case.dx.zero_()
    ops.lora_down_input_grad_(case.dx, torch.ones(96, 8), unit, *case.draw)
    assert torch.equal(case.dx != 0, case.keep)


def test_no_tokens_give_zero_gradients():
    case = Case((0, 64, 4, 0.1, 0), torch.float32)
    ops.lora_down_(case.z, case.x, case.A, *case.draw)
    ops.lora_down_input_grad_(case.dx, case.dz, case.A, *case.draw)
    assert (ops.lora_down_weight_grad(case.dz, case.x, *case.draw) == 0).all()
    assert (ops.lora_up_weight_grad(case.x, case.dz, 1.0) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ops_are_well_registered(dtype):
    case = Case((32, 64, 16, 0.1, 0), dtype)
    x, dz = case.x.contiguous(), case.dz.contiguous()
    torch.library.opcheck(ops.lora_down_.default, (torch.empty_like(dz), x, case.A, *case.draw))
    torch.library.opcheck(ops.lora_down_weight_grad.default, (dz, x, *case.draw))
    torch.library.opcheck(ops.lora_down_input_grad_.default, (case.dx.contiguous(), dz, case.A, *case.draw))
    torch.library.opcheck(ops.lora_up_weight_grad.default, (x, dz, 0.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: (c.dz, c.x.double()),
        lambda c: (c.dz[:-1], c.x),
        lambda c: (c.dz, c.x.t().contiguous().t()),
        lambda c: (c.dz.half(), c.x.half()),
        lambda c: (c.dz[0], c.x),
    ],
)
def test_ops_quote_the_condition_that_fails(change):
    case = Case((32, 64, 16, 0.1, 0), torch.float32)
    with pytest.raises(RuntimeError, match=r"megalora: .*(does not hold|no CPU kernel)"):
        ops.lora_down_weight_grad(*change(case), *case.draw)
