"""The rotation against transformers' apply_rotary_pos_emb, and what makes it a rotation."""

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as apply_to_neighbours
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from megalora.ops.rope import rope, split_rope


def tables(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 100.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def test_value_and_gradient_are_those_of_transformers():
    x = torch.randn(7, 3, 10, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(7, 10)
    ours = rope(x, cos, sin)
    wide = [torch.cat((t, t), -1) for t in (cos, sin)]
    theirs, _ = apply_rotary_pos_emb(x, x, *wide, unsqueeze_dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    dy = torch.randn_like(x)
    (a,), (b,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_gradcheck_with_a_factor_on_the_tables():
    """yarn multiplies cos and sin: the map is then no rotation, but its adjoint is what backward gives all the same."""
    cos, sin = (1.3 * t for t in tables(4, 6))
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x,))


def test_scores_depend_on_distance_alone():
    cos, sin = tables(20, 8)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    q, k = (rope(x.expand(20, 1, 8), cos, sin)[:, 0] for x in (q, k))
    scores = q @ k.t()
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    assert scores[0, 3] != scores[0, 4]


def test_position_zero_is_left_alone_and_the_input_too():
    cos, sin = tables(3, 8)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    before = x.clone()
    assert rope(x, cos, sin)[0].equal(x[0]) and x.equal(before)


def test_an_input_that_is_a_view():
    cos, sin = tables(5, 8)
    wide = torch.randn(5, 3, 16, dtype=torch.float64)
    assert rope(wide[..., 4:12], cos, sin).equal(rope(wide[..., 4:12].contiguous(), cos, sin))


# ---- cut into heads, and rotated


HEADS = pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 3), (5, 1), (1, 2)])


def by_hand(qkv, cos, sin, heads, kv_heads):
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], 1)
    return rope(q, cos, sin), rope(k, cos, sin), v


@HEADS
@pytest.mark.parametrize("tokens", [7, 1])
def test_split_value_and_gradient(heads, kv_heads, tokens):
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * 10, dtype=torch.float64, requires_grad=True)
    cos, sin = (1.3 * t for t in tables(tokens, 10))
    ours, theirs = split_rope(qkv, cos, sin, heads, kv_heads), by_hand(qkv, cos, sin, heads, kv_heads)
    assert [y.shape for y in ours] == [(tokens, n, 10) for n in (heads, kv_heads, kv_heads)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    assert ours[2].equal(theirs[2])
    grads = [torch.randn_like(y) for y in ours]
    (a,), (b,) = torch.autograd.grad(ours, qkv, grads), torch.autograd.grad(theirs, qkv, grads)
    assert a.shape == qkv.shape
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_split_gradcheck():
    cos, sin = (1.3 * t for t in tables(3, 6))
    qkv = torch.randn(3, 4 * 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: split_rope(x, cos, sin, 2, 1), (qkv,))


@pytest.mark.parametrize("read", [0, 1, 2])
def test_a_part_that_is_not_read_has_no_gradient(read):
    cos, sin = tables(5, 8)
    qkv = torch.randn(5, 6 * 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(split_rope(qkv, cos, sin, 2, 2)[read].sum(), qkv)
    found = (grad != 0).view(5, 3, 16).any(-1).any(0)
    assert found.tolist() == [part == read for part in range(3)]


def test_split_of_gradients_that_are_views():
    """As attention gives them, heads before tokens."""
    cos, sin = tables(5, 8)
    qkv = torch.randn(5, 4 * 8, dtype=torch.float64, requires_grad=True)
    ours, theirs = split_rope(qkv, cos, sin, 2, 1), by_hand(qkv, cos, sin, 2, 1)
    grads = [torch.randn(y.shape[1], 8, 5, dtype=torch.float64).permute(2, 0, 1) for y in ours]
    (a,), (b,) = torch.autograd.grad(ours, qkv, grads), torch.autograd.grad(theirs, qkv, grads)
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_split_leaves_its_input_alone_and_keeps_the_tables_alone():
    cos, sin = tables(5, 8)
    qkv = torch.randn(5, 4 * 8, dtype=torch.float64, requires_grad=True)
    before, kept = qkv.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        parts = split_rope(qkv, cos, sin, 2, 1)
    sum(y.sum() for y in parts).backward()
    assert qkv.equal(before) and sorted(kept) == sorted([cos.data_ptr(), sin.data_ptr()])


@pytest.mark.parametrize("size", [10, 4])
def test_neighbours_rotate_as_in_transformers(size):
    """The first `size` features of heads of 10, alone and cut out of qkv."""
    qkv = torch.randn(7, (3 + 2 * 2) * 10, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(7, size)
    q, k, v = qkv.unflatten(-1, (-1, 10)).split([3, 2, 2], dim=1)
    wide = [torch.cat((t, t), -1) for t in (cos, sin)]
    theirs = [*apply_to_neighbours(q, k, *wide, unsqueeze_dim=1), v]
    dy = [torch.randn_like(x) for x in theirs]
    (wanted,) = torch.autograd.grad(theirs, qkv, dy)
    for ours in (
        split_rope(qkv, cos, sin, 3, 2, True),
        [*(rope(x, cos, sin, True) for x in qkv.unflatten(-1, (-1, 10)).split([3, 2, 2], dim=1)[:2]), v],
    ):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
        (found,) = torch.autograd.grad(ours, qkv, dy, retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
