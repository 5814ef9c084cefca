"""The decoding kernels on a GPU against torch in float64."""

import pytest
import torch

from megalora.ops import extension
from megalora.ops.attention import attention
from megalora.ops.decode_attention import decode_attention, has_kernel
from megalora.ops.fp8 import quantise_rows
from megalora.ops.fused_norm import NormWeights, add_fused_norm
from megalora.ops.matmul import matmul_nt
from megalora.ops.rope import split_rope
from megalora.ops.step_linear import Beside, fp8_step_linear, step_down_, step_linear, takes
from megalora.ops.swiglu import swiglu

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_the_kernels():
    if not extension.has_kernels("cuda"):
        pytest.skip("megalora's CUDA kernels are not built: make install with a CUDA toolkit")


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(("out_features", "in_features"), [(6144, 4160), (7, 24), (1001, 520), (130, 4096)])
def test_a_few_rows(dtype, rows, out_features, in_features):
    generator = torch.Generator("cuda").manual_seed(1)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)
        for shape in ((rows, in_features + 8), (out_features, in_features + 8), (out_features,))
    )
    x, weight = x[:, :in_features], weight[:, :in_features]
    for b in (None, bias):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(matmul_nt(x, weight, b).double(), expected, rtol=0, atol=0.01 * expected.abs().max())


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (28, 4, 128), (8, 8, 64), (40, 8, 128)]
)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("sequences", "capacity"), [(1, 2048), (5, 300), (32, 130)])
def test_attention_over_the_cache(dtype, heads, kv_heads, dim, window, sequences, capacity):
    assert has_kernel("cuda", dtype, heads // kv_heads, dim)
    generator = torch.Generator("cuda").manual_seed(2)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    keys, values = (randn(sequences + 2, kv_heads, capacity, dim) for _ in range(2))
    q, k, v = randn(sequences, heads, dim), randn(sequences, kv_heads, dim), randn(sequences, kv_heads, dim)
    slots = torch.randperm(sequences + 2, generator=generator, device="cuda")[:sequences]
    positions = torch.randint(0, capacity, (sequences,), generator=generator, device="cuda")
    positions[0], positions[-1] = capacity - 1, 0 if sequences > 1 else capacity - 1
    found = decode_attention(q, k, v, keys, values, slots, positions, window)
    assert keys[slots, :, positions].equal(k) and values[slots, :, positions].equal(v)
    for b, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        seen = (x[slot, :, : position + 1].transpose(0, 1).double() for x in (keys, values))
        whole = q.new_zeros(position + 1, heads, dim, dtype=torch.float64)
        whole[-1] = q[b]
        expected = attention(whole, *seen, [0, position + 1], window)[-1]
        torch.testing.assert_close(found[b].double(), expected, rtol=0.02, atol=0.02)


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize(("sequences", "capacity"), [(1, 2048), (5, 300)])
def test_attention_rotates_what_it_reads(dtype, heads, kv_heads, dim, sequences, capacity):
    generator = torch.Generator("cuda").manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    qkv, angles = randn(sequences, (heads + 2 * kv_heads) * dim), randn(sequences, dim // 2)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, capacity, (sequences,), generator=generator, device="cuda")
    slots, arrived = torch.arange(sequences, device="cuda"), torch.zeros(64, dtype=torch.int32, device="cuda")
    caches = [randn(sequences, kv_heads, capacity, dim) for _ in range(2)]
    apart = [cache.clone() for cache in caches]
    heads_of = qkv.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    found = decode_attention(*heads_of, *caches, slots, positions, angles=(cos, sin), arrived=arrived)
    wanted = decode_attention(*split_rope(qkv, cos, sin, heads, kv_heads), *apart, slots, positions)
    assert not arrived.any()
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    for cache, other in zip(caches, apart, strict=True):
        torch.testing.assert_close(cache, other, rtol=0.01, atol=0.01)


@DTYPES
@pytest.mark.parametrize("base_format", ["dense", "fp8"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(("inputs", "outputs", "act"), [(4096, 6144, None), (4096, 28672, "silu"), (1536, 96, "gelu")])
@torch.no_grad()
def test_a_linear_with_what_stands_beside_it(dtype, base_format, rows, inputs, outputs, act):
    generator = torch.Generator("cuda").manual_seed(4)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    x, delta, bias, weight = randn(rows, inputs), randn(rows, inputs), randn(outputs), randn(outputs, inputs) * 0.02
    norm = NormWeights("rms", 1 + 0.1 * randn(inputs), None, 1e-5)
    beside = Beside(delta, norm, act)
    assert takes(x, beside)
    total, normed = add_fused_norm(x, delta, norm)
    if base_format == "dense":
        found, y = step_linear(x, weight, bias, beside)
        wanted = matmul_nt(normed, weight, bias)
    else:
        codes, scale = quantise_rows(weight.float())
        given = codes, scale.view(1, -1), x.new_empty(outputs, 0), bias, True
        found, y = fp8_step_linear(x, *given, beside)
        wanted = torch.ops.megalora.fp8_skinny_linear(normed, *given)
    wanted = wanted if act is None else swiglu(wanted, 0, act)
    assert found.equal(total)
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)


@DTYPES
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("inputs", "rank", "norms"), [(4096, 48, True), (14336, 16, False)])
def test_a_branch_with_what_stands_before_it(dtype, rows, inputs, rank, norms):
    generator = torch.Generator("cuda").manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    x, delta, A = randn(rows, inputs), randn(rows, inputs), randn(rank, inputs) * 0.02
    norm = NormWeights("rms", 1 + 0.1 * randn(inputs), None, 1e-5)
    X = torch.full((rows, inputs + 64), float("nan"), dtype=dtype, device="cuda")
    found = step_down_(x, A, Beside(delta, norm) if norms else Beside(), X)
    total, n = add_fused_norm(x, delta, norm) if norms else (x, x)
    assert found.equal(total) and not X[:, inputs + rank :].any()
    torch.testing.assert_close(X[:, :inputs], n, rtol=0.02, atol=0.02)
    torch.testing.assert_close(X[:, inputs : inputs + rank], n @ A.t(), rtol=0.02, atol=0.02)
