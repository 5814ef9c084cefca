"""The gated delta rule: chunks against the recurrence token by token, documents apart, and against transformers."""

import itertools

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from megalora.ops.delta_rule import CHUNK, Documents, continued_delta_rule, delta_rule, delta_step
from megalora.ops.short_convolution import short_convolution

BOUNDS = [0, 5, 5 + 2 * CHUNK, 9 + 5 * CHUNK, 10 + 5 * CHUNK, 73 + 5 * CHUNK]  # one of whole chunks, one of one token


def drawn(tokens: int, groups: int = 2, repeats: int = 3, key: int = 6, value: int = 5) -> list[torch.Tensor]:
    """q, k, v, g and beta of float64, which require gradients."""
    torch.manual_seed(1)
    heads = groups * repeats
    q, k = (torch.randn(tokens, groups, key, dtype=torch.float64) for _ in range(2))
    v = torch.randn(tokens, heads, value, dtype=torch.float64)
    g = -torch.rand(tokens, heads, dtype=torch.float64) * torch.logspace(-2, 1, heads, dtype=torch.float64)
    beta = torch.rand(tokens, heads, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def by_token(q, k, v, g, beta, state=None):
    """The recurrence of one document, written out: (o, the state behind it)."""
    repeats, outputs = v.shape[1] // k.shape[1], []
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = q.repeat_interleave(repeats, 1) / q.shape[-1] ** 0.5, k.repeat_interleave(repeats, 1)
    state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2]) if state is None else state
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        told = (state * k[t][:, :, None]).sum(1)
        state = state + k[t][:, :, None] * (beta[t][:, None] * (v[t] - told))[:, None]
        outputs.append((state * q[t][:, :, None]).sum(1))
    return torch.stack(outputs), state


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def test_chunks_are_the_recurrence_of_each_document():
    """Outputs and gradients of packed documents, those of each alone; what one document says changes no other."""
    given = drawn(BOUNDS[-1])
    grad = torch.randn(BOUNDS[-1], 6, 5, dtype=torch.float64)
    o = delta_rule(*given, Documents.of(BOUNDS))
    ours = torch.autograd.grad(o, given, grad)
    alone = [by_token(*(x[a:b] for x in given))[0] for a, b in itertools.pairwise(BOUNDS)]
    expected = torch.cat(alone)
    assert relative(o, expected) < 1e-12
    for mine, other in zip(ours, torch.autograd.grad(expected, given, grad), strict=True):
        assert relative(mine, other) < 1e-11
    changed = [x.detach().clone() for x in given]
    for x in changed:
        x[5 : 5 + 2 * CHUNK] *= 0.5
    again = delta_rule(*changed, Documents.of(BOUNDS))
    same = [i for i in range(BOUNDS[-1]) if not 5 <= i < 5 + 2 * CHUNK]
    assert torch.equal(again[same], o.detach()[same]) and not torch.equal(again, o)


def test_documents_go_on_from_their_states():
    """In two calls, and token by token, as in one; documents of one token and of several chunks."""
    given = [x.detach() for x in drawn(BOUNDS[-1])]
    states = torch.randn(len(BOUNDS) - 1, 6, 6, 5, dtype=torch.float64)
    o, left = continued_delta_rule(*given, Documents.of(BOUNDS), states)
    pairs = list(itertools.pairwise(BOUNDS))
    for number, (a, b) in enumerate(pairs):
        expected, state = by_token(*(x[a:b] for x in given), states[number])
        assert relative(o[a:b], expected) < 1e-12 and relative(left[number], state) < 1e-12
    a, b = pairs[-1]
    one = delta_step(*(x[a : a + 1] for x in given), states[-1:])
    after = continued_delta_rule(*(x[a + 1 : b] for x in given), Documents.of([0, b - a - 1]), one[1])
    assert relative(torch.cat([one[0], after[0]]), o[a:b]) < 1e-12 and relative(after[1][0], left[-1]) < 1e-12


def test_float32_is_that_of_transformers():
    given = [x.detach().float() for x in drawn(150, key=16, value=8)]
    ours = delta_rule(*given, Documents.of([0, 150]))
    assert ours.dtype == torch.float32
    for rule in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        q, k, v, g, beta = (x[None] for x in given)
        expected = rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0][0]
        assert relative(ours, expected) < 2e-6
    exact = delta_rule(*(x.double() for x in given), Documents.of([0, 150]))
    assert relative(ours.double(), exact) < 2e-6


def test_equal_keys_stay_exact_in_float32():
    """The hardest system: powers of it grow beyond what float32 holds, its inverse does not."""
    given = [x.detach().float() for x in drawn(3 * CHUNK, key=16)]
    given[1][:] = given[1][:1]
    given[3][:], given[4][:] = -1e-4, 1.0
    ours = delta_rule(*given, Documents.of([0, 3 * CHUNK]))
    assert relative(ours.double(), by_token(*(x.double() for x in given))[0]) < 1e-5


def test_strong_decay_is_finite():
    given = [x.detach().float() for x in drawn(2 * CHUNK)]
    given[3][:] = -80.0
    for x in given:
        x.requires_grad_()
    o = delta_rule(*given, Documents.of([0, 2 * CHUNK]))
    o.sum().backward()
    assert o.isfinite().all() and all(x.grad.isfinite().all() for x in given)


@pytest.mark.parametrize("width", [4, 2])
def test_convolution_reads_its_document_alone(width):
    torch.manual_seed(2)
    bounds = [0, 1, 3, 9]
    x, weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), torch.randn(6, width, dtype=torch.float64)
    ages = Documents.of(bounds).ages
    assert torch.autograd.gradcheck(lambda x: short_convolution(x, weight, ages), x)
    y = short_convolution(x, weight, ages)
    for a, b in itertools.pairwise(bounds):
        one = x[a:b].t()[None]
        expected = torch.nn.functional.conv1d(one, weight[:, None], padding=width - 1, groups=6)[0, :, : b - a]
        assert relative(y[a:b], torch.nn.functional.silu(expected.t())) < 1e-13
    whole = short_convolution(x, weight, None)
    assert relative(whole, short_convolution(x, weight, torch.arange(9))) == 0


def test_documents_of_no_tokens_are_passed_over():
    found = Documents.of([0, 0, 70, 70, 75])
    assert found.counts == (2, 1) and found.order == (1, 3) and len(found.rows) == 3 * CHUNK
    assert torch.equal(found.rows[found.places], torch.arange(75)) and found.filling.sum() == 3 * CHUNK - 75
    assert found.last == [2, 1]


def test_room_for_other_documents_of_as_many_tokens():
    """As a CUDA graph has it: all that kernels read lies in place, and what is behind it is empty."""
    tokens, most = 300, 5
    layouts = [[0, 300], [0, 64, 128, 300], [0, 1, 2, 3, 4, 300], [0, 65, 130, 195, 260, 300], [0, 0, 150, 150, 300]]
    room = Documents.of(layouts[0]).alike(most)
    places = room.ages.data_ptr(), room.pieces.data_ptr(), room.spans.data_ptr()
    for bounds in [*layouts, *layouts[::-1]]:
        own = Documents.of(bounds)
        room.put(own)
        assert places == (room.ages.data_ptr(), room.pieces.data_ptr(), room.spans.data_ptr())
        assert room.ages.equal(own.ages)
        for x, wanted in ((room.pieces, own.pieces), (room.spans, own.spans)):
            assert x[: len(wanted)].equal(wanted) and (x[len(wanted) :] == tokens).all()
    # The most chunks there can be.
    assert len(Documents.of([0, 65, 130, 195, 260, 300]).pieces) == 9 == len(room.pieces)
