"""The decoding kernels on a GPU against torch in float64."""

import pytest
import torch

from megalora.ops import extension
from megalora.ops.attention import attention
from megalora.ops.decode_attention import decode_attention, has_kernel
from megalora.ops.matmul import matmul_nt

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
