"""Stateless dropout: generator, what a mask depends on, and the C++ op against the reference, bit by bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalora.errors import UserError
from megalora.ops import dropout as ops
from megalora.ops import extension
from megalora.ops.dropout import Dropout, dropout, dropout_add_, keep_mask, philox4x32

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SPEC = Dropout(p=0.1, seed=1234, site=7, step=3)

needs_extension = pytest.mark.skipif(
    not extension.load(), reason="megalora._C is not built for this torch: " + extension.REMEDY
)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def op_arguments(spec: Dropout) -> tuple:
    return spec.key, spec.site, spec.step, spec.feature_offset, spec.p


# ---- the generator


@pytest.mark.parametrize(
    "counter, key, words",
    [  # the known answers that Random123 publishes (kat_vectors, "philox4x32 10")
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    counter = [torch.tensor([int(word, 16)]) for word in counter.split()]
    drawn = philox4x32(counter, tuple(int(word, 16) for word in key.split()))
    assert [f"{int(word):08x}" for word in drawn] == words.split()


def test_mask_is_the_lanes_of_the_documented_counter():
    token, site, step, seed, feature = (5 << 32) | 17, 11, 13, (3 << 32) | 9, 21
    counter = (torch.tensor([17]), feature // 8, step, 5)
    word = int(philox4x32(counter, (3 ^ 9, site))[feature % 8 // 2])
    lane = (word >> 16 * (feature % 2)) & 0xFFFF
    for threshold in (lane, lane + 1):  # kept at a threshold of the lane itself, dropped one above
        spec = Dropout(threshold / 65536, seed, site, step, feature_offset=feature)
        assert bool(keep_mask(torch.tensor([token]), 1, spec)) == (threshold == lane)


# ---- what a mask depends on, by whichever implementation is installed


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_and_mean(p):
    tokens, features = 512, 512
    kept = keep_mask(torch.arange(tokens), features, replace(SPEC, p=p)).double()
    deviation = (p * (1 - p) / (tokens * features)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation + 2**-16
    by_lane = kept.view(tokens, -1, 8).mean((0, 1))
    assert ((by_lane - (1 - p)).abs() < 5 * deviation * 8**0.5 + 2**-16).all()
    ones = torch.ones(tokens, features, dtype=torch.float64)
    x_hat = dropout(ones, torch.arange(tokens), replace(SPEC, p=p))
    assert abs(x_hat.mean() - 1) < 5 * deviation / (1 - p) + 2**-15


def test_seed_site_step_and_token_each_give_another_mask():
    tokens = torch.arange(64)
    specs = [SPEC, replace(SPEC, seed=1235), replace(SPEC, seed=1234 + (1 << 40)), replace(SPEC, seed=-1)]
    specs += [replace(SPEC, site=8), replace(SPEC, step=4), replace(SPEC, site=3, step=7)]
    masks = [keep_mask(tokens, 64, replace(spec, p=0.5)) for spec in specs]
    masks += [keep_mask(tokens + shift, 64, replace(SPEC, p=0.5)) for shift in (64, 1 << 32)]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 0.45 < (mask == other).double().mean() < 0.55


@given(offset=st.integers(0, 40), features=st.integers(1, 40), whole=st.just(96))
@settings(max_examples=40, deadline=None)
def test_a_slice_of_features_has_the_mask_of_the_whole(offset, features, whole):
    tokens = torch.arange(9)
    x = torch.randn(9, whole)
    expected = dropout(x, tokens, SPEC)[:, offset : offset + features]
    got = dropout(x[:, offset : offset + features], tokens, replace(SPEC, feature_offset=offset))
    assert same_bits(got, expected)


def test_a_token_takes_its_mask_wherever_it_lies():
    tokens, x = torch.arange(100, 164), torch.randn(64, 40)
    order = torch.randperm(64)
    assert same_bits(dropout(x[order], tokens[order], SPEC), dropout(x, tokens, SPEC)[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_is_zero_and_kept_is_scaled(dtype):
    x = torch.full((32, 48), -1.0, dtype=dtype)
    x[0, :], x[1, :] = torch.inf, torch.nan
    keep = keep_mask(torch.arange(32), 48, SPEC)
    x_hat = dropout(x, torch.arange(32), SPEC)
    assert x_hat.dtype == dtype
    assert (x_hat[~keep] == 0).all() and not torch.signbit(x_hat[~keep]).any()
    assert x_hat[0][keep[0]].isinf().all() and x_hat[1][keep[1]].isnan().all()
    assert (x_hat[2:][keep[2:]] == -torch.tensor(65536 / (65536 - 6554), dtype=dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_add_is_the_backward_of_dropout(dtype):
    tokens, x, g = torch.arange(16), torch.randn(16, 24, dtype=dtype), torch.randn(16, 24, dtype=dtype)
    dx = torch.zeros_like(x)
    dropout_add_(dx, g, tokens, SPEC)
    assert same_bits(dx + 0, dropout(g, tokens, SPEC) + 0)  # m ⊙ g: the mask is its own adjoint
    if dtype == torch.float64:
        assert torch.allclose((dropout(x, tokens, SPEC) * g).sum(), (x * dx).sum(), rtol=1e-12)
    before = dx.clone()
    dropout_add_(dx, g, tokens, SPEC)
    keep = keep_mask(tokens, 24, SPEC)
    assert same_bits(dx[~keep], before[~keep])


def test_p_zero_changes_nothing():
    x, tokens, spec = torch.randn(4, 8), torch.arange(4), replace(SPEC, p=0.0)
    assert dropout(x, tokens, spec) is x
    out = torch.ones(4, 8)
    dropout_add_(out, x, tokens, spec)
    assert torch.equal(out, 1 + x)


@pytest.mark.parametrize("p", [-0.1, 1.0, 0.999999, float("nan")])
def test_p_out_of_range_is_named(p):
    with pytest.raises(UserError, match=r"dropout p=.* lora_dropout"):
        replace(SPEC, p=p)


# ---- the C++ op against the reference


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    tokens=st.integers(0, 20),
    features=st.one_of(st.integers(0, 70), st.sampled_from([1016, 1024, 1030, 2100])),
    offset=st.one_of(st.integers(0, 20), st.sampled_from([1021, 2**34 + 3])),
    p=st.sampled_from([0.05, 0.1, 0.5, 1.5 / 65536, 2.5 / 65536, 0.99, 0.0]),
    seed=st.integers(-(2**63), 2**64 - 1),
    site=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**32 - 1),
    first_token=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_op_gives_the_bits_of_the_reference(dtype, tokens, features, offset, p, seed, site, step, first_token):
    spec = Dropout(p, seed, site, step, offset)
    token_index = torch.arange(first_token, first_token + tokens)
    x = torch.randn(tokens, features, dtype=torch.float64).mul(3).to(dtype)
    expected = ops.dropout_reference(x, token_index, spec)
    assert same_bits(torch.ops.megalora.dropout(x, token_index, *op_arguments(spec)), expected)

    got = torch.randn(tokens, features, dtype=torch.float64).to(dtype)
    expected = got.clone()
    torch.ops.megalora.dropout_add_(got, x, token_index, *op_arguments(spec))
    ops.dropout_add_reference_(expected, x, token_index, spec)
    assert same_bits(got, expected)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_op_rounds_every_value_of_sixteen_bits_like_the_reference(dtype):
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half).view(256, 256).to(dtype)
    x[x.isnan()] = 0  # the payload of a NaN is not promised
    tokens, spec = torch.arange(256), replace(SPEC, p=0.3)
    assert same_bits(torch.ops.megalora.dropout(x, tokens, *op_arguments(spec)), ops.dropout_reference(x, tokens, spec))


@needs_extension
def test_op_takes_strided_rows_and_transposed_input():
    tokens, whole = torch.arange(0, 32, 2), torch.randn(16, 64)
    assert not tokens[::2].is_contiguous()
    for x, index in [(whole[:, 5:40], tokens), (whole.t(), torch.arange(64)), (whole[::2], tokens[::2])]:
        expected = ops.dropout_reference(x, index, SPEC)
        got = torch.ops.megalora.dropout(x, index, *op_arguments(SPEC))
        assert got.is_contiguous() and same_bits(got, expected)
    g = torch.randn(35, 16).t()
    out, expected = whole.clone(), whole.clone()
    torch.ops.megalora.dropout_add_(out[:, 5:40], g, tokens, *op_arguments(SPEC))
    ops.dropout_add_reference_(expected[:, 5:40], g, tokens, SPEC)
    assert same_bits(out, expected)


@needs_extension
def test_op_gives_the_same_bits_on_any_number_of_threads():
    x, g, tokens = torch.randn(301, 576), torch.randn(301, 576), torch.arange(301)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = g.clone()
            torch.ops.megalora.dropout_add_(out, x, tokens, *op_arguments(SPEC))
            results.append((torch.ops.megalora.dropout(x, tokens, *op_arguments(SPEC)), out))
    finally:
        torch.set_num_threads(threads)
    for x_hat, out in results[1:]:
        assert same_bits(x_hat, results[0][0]) and same_bits(out, results[0][1])


@needs_extension
@pytest.mark.parametrize("op", ["dropout", "dropout_add_"])
def test_op_is_well_registered(op):
    x, tokens = torch.randn(6, 20), torch.arange(6)
    arguments = (x, tokens) if op == "dropout" else (torch.randn(6, 20), x, tokens)
    torch.library.opcheck(getattr(torch.ops.megalora, op).default, (*arguments, *op_arguments(SPEC)))


@needs_extension
def test_op_is_traced_by_torch_compile():
    def function(x, tokens):
        return dropout(x, tokens, SPEC) * 2

    x, tokens = torch.randn(5, 16), torch.arange(5)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, tokens), function(x, tokens))


@needs_extension
@pytest.mark.parametrize(
    "change, condition",
    [
        (lambda x, tokens: (x[0], tokens), "x.dim() == 2"),
        (lambda x, tokens: (x, tokens[:3]), "token_index.size(0) == x.size(0)"),
        (lambda x, tokens: (x, tokens.int()), "token_index.scalar_type() == at::kLong"),
        (lambda x, tokens: (x.int(), tokens), "at::isFloatingType"),
    ],
)
def test_op_quotes_the_condition_that_fails(change, condition):
    x, tokens = change(torch.randn(4, 8), torch.arange(4))
    with pytest.raises(RuntimeError) as error:
        torch.ops.megalora.dropout(x, tokens, *op_arguments(SPEC))
    assert condition in str(error.value)
