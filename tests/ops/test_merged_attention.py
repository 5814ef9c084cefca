"""Attention of pieces of documents, call by call: against attention of whole documents."""

import pytest
import torch
from plain_attention import Plain

from megalora.data.context import cut_documents
from megalora.ops.merged_attention import Cudnn, are_long, heads_at_once, merged_attention, merges, takes_pieces
from megalora.ops.piece_attention import Pieces, piece_attention


def pieces_of(bounds: list[int], ranks: int, rank: int) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """(tokens of the rank, bounds of its pieces, their keys)."""
    own = cut_documents(bounds, ranks)[rank]
    tokens = [t for piece in own for t in range(piece.start, piece.stop)]
    starts = [0]
    for piece in own:
        starts.append(starts[-1] + piece.stop - piece.start)
    return tokens, starts, [(piece.document, piece.stop) for piece in own]


def tensors(total: int, heads: int, kv_heads: int, dim: int, **place) -> list[torch.Tensor]:
    torch.manual_seed(0)
    sizes = heads, kv_heads, kv_heads, heads
    return [torch.randn(total, size, dim, dtype=torch.float64).to(**place) for size in sizes]


@pytest.mark.parametrize("workspace", [1, 1 << 30])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("bounds", [[0, 24], [0, 11, 12, 27, 30]])
def test_pieces_see_what_whole_documents_show_them(bounds, rank, workspace, monkeypatch):
    monkeypatch.setattr("megalora.ops.merged_attention._WORKSPACE", workspace)
    q, k, v, dout = tensors(bounds[-1], 4, 2, 8)
    for x in (q, k, v):
        x.requires_grad_()
    tokens, starts, spans = pieces_of(bounds, 3, rank)
    rows = torch.cat([torch.arange(a, b) for a, b in spans])
    keys = [0]
    for a, b in spans:
        keys.append(keys[-1] + b - a)
    expected = piece_attention(q[tokens], k[rows], v[rows], Pieces(tuple(starts), tuple(keys)))
    found = merged_attention(q[tokens], k, v, starts, spans, kernel=Plain())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    given = torch.autograd.grad(found, (q, k, v), dout[tokens])
    for one, other in zip(given, torch.autograd.grad(expected, (q, k, v), dout[tokens]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_as_many_heads_at_a_time_as_the_workspace_has_room_for():
    assert heads_at_once(8, 4, 128, 32768, 98304) == 4 and heads_at_once(8, 4, 128, 393216, 393216) == 1
    assert heads_at_once(8, 4, 128, 2048, 2048) == 8


def test_only_where_sums_may_have_any_order(monkeypatch):
    """cuDNN's backward pass has none that is fixed: --deterministic leaves it out, in the plan of a run too."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    assert merges(gpu) and takes_pieces(128, torch.bfloat16, gpu, [32768])
    assert not takes_pieces(128, torch.float32, gpu, [32768]) and not merges(torch.device("cpu"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not merges(gpu) and not takes_pieces(128, torch.bfloat16, gpu, [32768])
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not merges(gpu)


def test_few_long_pieces_go_this_way():
    assert are_long(128, [32768, 32768]) and are_long(64, [4096, 100])
    assert not are_long(128, [1024] * 2), "short ones"
    assert not are_long(128, [32768] * 17), "too many"
    assert not are_long(256, [32768] * 2), "heads that cuDNN may not take"
    assert not are_long(128, [32768, 8]) and not are_long(128, [])


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [1, 1 << 30])
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 2, 128), (4, 4, 64)])
@pytest.mark.parametrize("bounds", [[0, 16384], [0, 8191, 16384]])
@pytest.mark.parametrize("rank", [0, 1])
def test_cudnn_gives_what_one_kernel_gives(bounds, rank, heads, kv_heads, dim, workspace, monkeypatch):
    monkeypatch.setattr("megalora.ops.merged_attention._WORKSPACE", workspace)
    q, k, v, dout = tensors(bounds[-1], heads, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
    for x in (q, k, v):
        x.requires_grad_()
    tokens, starts, spans = pieces_of(bounds, 2, rank)
    rows = torch.cat([torch.arange(a, b) for a, b in spans]).cuda()
    keys = [0]
    for a, b in spans:
        keys.append(keys[-1] + b - a)
    pieces = Pieces.of(tuple(starts), tuple(keys), q.device)
    expected = piece_attention(q[tokens], k[rows], v[rows], pieces)
    found = merged_attention(q[tokens], k, v, starts, spans, kernel=Cudnn())
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    given = torch.autograd.grad(found, (q, k, v), dout[tokens])
    for one, other in zip(given, torch.autograd.grad(expected, (q, k, v), dout[tokens]), strict=True):
        assert (one.float() - other.float()).norm() < 0.01 * other.float().norm()
