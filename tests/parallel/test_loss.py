"""Cross entropy with a cut vocabulary, in chunks, of labelled tokens only: against torch's on the whole logits."""

from __future__ import annotations

import pytest
import torch
from spawn import spawn

from megalora.parallel import embedding
from megalora.parallel import loss as module
from megalora.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from megalora.parallel.loss import cross_entropy_sum
from megalora.parallel.mesh import Axis, build_mesh
from megalora.parallel.placement import Placement

T, H = 24, 10
LABELS = {
    "most": [-100, 3, 0, 12, 12, -100, 7, 5, 1, 2, -100, -100, 4, 6, 8, 9, 10, 11, 0, 12, 3, -100, 5, 6],
    "all": [(5 * t) % 13 for t in range(T)],
    "one": [-100] * 20 + [12] + [-100] * 3,
    "none": [-100] * T,
    "of one rank's words": [0, 1, 2] * 8,
}


def tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(hidden: torch.Tensor, head: VocabParallelHead, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy_sum(hidden, head, labels, (labels != -100).nonzero().squeeze(-1))


def head_of(vocab_size: int, place: Placement) -> VocabParallelHead:
    head = VocabParallelHead(vocab_size, H, place)
    with torch.no_grad():
        head.weight.copy_(tensor(2, vocab_size, H)[head.start : head.stop])
    return head


def expected(labels: torch.Tensor, vocab_size: int = 13, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = (tensor(1, T, H) * scale).requires_grad_()
    logits = hidden @ tensor(2, vocab_size, H).t()
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return total.detach(), torch.autograd.grad(1.7 * total, hidden)[0]


def ours(labels: torch.Tensor, place: Placement, vocab_size: int = 13, scale: float = 1.0, mine=slice(None)):
    hidden = (tensor(1, T, H) * scale)[mine].clone().requires_grad_()
    total = loss_of(hidden, head_of(vocab_size, place), labels)
    (1.7 * total).backward()
    return total.detach(), hidden.grad


def equal(found, wanted, mine=slice(None)):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], wanted[1][mine], rtol=1e-12, atol=1e-12)


ALONE = Placement(Axis(), False, torch.float64, "cpu")


@pytest.mark.parametrize("chunk", [1, 13, 26, 5 * 13 + 1, 18 * 13, 18 * 13 - 1, 1 << 23])
@pytest.mark.parametrize("name", LABELS)
def test_any_chunk_gives_the_loss_of_the_whole(name, chunk, monkeypatch):
    """A chunk smaller than one row of logits is one row; the last chunk is short or exactly full."""
    monkeypatch.setitem(module.CHUNK_LOGITS, "cpu", chunk)
    monkeypatch.setitem(module.FEWEST_ROWS, "cpu", 1)
    labels = torch.tensor(LABELS[name])
    equal(ours(labels, ALONE), expected(labels))


@pytest.mark.parametrize("chunk", [13, 5 * 13 + 1, 1 << 23])
@pytest.mark.parametrize("name", ["most", "all", "one"])
def test_each_label_counts_by_its_coefficient(name, chunk, monkeypatch):
    monkeypatch.setitem(module.CHUNK_LOGITS, "cpu", chunk)
    monkeypatch.setitem(module.FEWEST_ROWS, "cpu", 1)
    labels = torch.tensor(LABELS[name])
    labelled = (labels != -100).nonzero().squeeze(-1)
    coefficients = tensor(3, len(labelled)).abs() + 0.1
    hidden, theirs = (tensor(1, T, H).requires_grad_() for _ in range(2))
    total = cross_entropy_sum(hidden, head_of(13, ALONE), labels, labelled, coefficients)
    (1.7 * total).backward()
    logits = (theirs @ tensor(2, 13, H).t())[labelled]
    losses = torch.nn.functional.cross_entropy(logits, labels[labelled], reduction="none")
    wanted = (losses * coefficients).sum()
    (1.7 * wanted).backward()
    equal((total.detach(), hidden.grad), (wanted.detach(), theirs.grad))


def test_no_label_gives_nothing():
    total, grad = ours(torch.tensor(LABELS["none"]), ALONE)
    assert total == 0 and grad.shape == (T, H) and not grad.any()


def test_gradcheck():
    head, labels = head_of(13, ALONE), torch.tensor(LABELS["most"])[:6]
    assert torch.autograd.gradcheck(lambda h: loss_of(h, head, labels), (tensor(1, 6, H).requires_grad_(),))


def test_only_labelled_tokens_get_a_gradient():
    labels = torch.tensor(LABELS["most"])
    _, grad = ours(labels, ALONE)
    assert ((grad != 0).any(-1) == (labels != -100)).all()


def test_large_logits_do_not_overflow():
    labels = torch.tensor(LABELS["all"])
    found = ours(labels, ALONE, scale=1e4)
    assert found[0].isfinite() and found[0] > 1e4
    torch.testing.assert_close(found[0], expected(labels, scale=1e4)[0], rtol=1e-12, atol=0)


def test_without_gradient_as_in_evaluation():
    labels = torch.tensor(LABELS["most"])
    with torch.no_grad():
        total = loss_of(tensor(1, T, H), head_of(13, ALONE), labels)
    torch.testing.assert_close(total, expected(labels)[0], rtol=1e-12, atol=1e-12)
    assert not total.requires_grad


def test_low_precision_sums_in_float32():
    labels = torch.tensor(LABELS["all"])
    place = Placement(Axis(), False, torch.bfloat16, "cpu")
    hidden = tensor(1, T, H).to(torch.bfloat16).requires_grad_()
    head = head_of(13, place)
    total = loss_of(hidden, head, labels)
    total.backward()
    assert total.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    logits = (hidden @ head.weight.t()).float()  # what bfloat16 rounds, both sides round
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))


def test_the_factor_of_a_loss_is_not_rounded():
    """1 / 4080 in bfloat16 is 0.4% off, and would make all gradients so."""
    labels = torch.tensor(LABELS["all"])
    head = head_of(13, Placement(Axis(), False, torch.bfloat16, "cpu"))
    grads = []
    for factor in (1.0, 1 / 4080):
        hidden = tensor(1, T, H).to(torch.bfloat16).requires_grad_()
        (loss_of(hidden, head, labels) * factor).backward()
        grads.append(hidden.grad)
    assert torch.equal(grads[1], (grads[0].float() * (1 / 4080)).bfloat16())


def test_a_large_vocabulary_is_read_for_many_rows_at_a_time():
    assert [module.chunk_rows("cpu", v) for v in (4096, 49_152, 151_936)] == [2048, 256, 256]
    assert [module.chunk_rows("cuda", v) for v in (49_152, 1 << 29)] == [5461, 1]


def test_the_head_is_frozen():
    head, hidden = head_of(13, ALONE), tensor(1, T, H).requires_grad_()
    loss_of(hidden, head, torch.tensor(LABELS["all"])).backward()
    assert head.weight.grad is None


# ---- a cut vocabulary


def cut(rank: int, world_size: int, vocab_size: int, sequence_parallel: bool, chunk: int):
    module.CHUNK_LOGITS["cpu"], module.FEWEST_ROWS["cpu"] = chunk, 1
    place = Placement(build_mesh(rank, world_size, tp=world_size).tp, sequence_parallel, torch.float64, "cpu")
    mine = slice(rank * T // world_size, (rank + 1) * T // world_size) if sequence_parallel else slice(None)
    found = {}
    for name, labels in LABELS.items():
        labels = torch.tensor(labels) % vocab_size if name == "all" else torch.tensor(labels).clamp(max=vocab_size - 1)
        found[name] = (labels, mine, *ours(labels, place, vocab_size, mine=mine))
    logits = head_of(vocab_size, place)(tensor(1, T, H))
    table = VocabParallelEmbedding(vocab_size, H, place)
    with torch.no_grad():
        table.weight.copy_(tensor(2, vocab_size, H)[table.start : table.stop])
    return found, logits, table(torch.arange(T) % vocab_size), mine


def check_cut(tp: int, vocab_size: int, sequence_parallel: bool, chunk: int) -> None:
    for rank in spawn(cut, tp, vocab_size, sequence_parallel, chunk):
        found, logits, embedded, mine = rank
        for labels, tokens, total, grad in found.values():
            equal((total, grad), expected(labels, vocab_size), tokens)
        torch.testing.assert_close(logits, tensor(1, T, H) @ tensor(2, vocab_size, H).t(), rtol=1e-12, atol=1e-12)
        assert embedded.equal(tensor(2, vocab_size, H)[torch.arange(T) % vocab_size][mine])


@pytest.mark.parametrize(
    "tp, vocab_size, chunk",
    [(2, 13, 1 << 23), (2, 16, 20), (4, 13, 1 << 23), (4, 5, 1 << 23), (4, 4, 3)],
    ids=["uneven", "even, chunks", "uneven at tp4", "one or two words a rank", "one word a rank, chunks"],
)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_cut_of_the_vocabulary(tp, vocab_size, chunk, sequence_parallel):
    check_cut(tp, vocab_size, sequence_parallel, chunk)


@pytest.mark.parametrize("tp", [2, 4])
def test_chunks_of_an_uneven_vocabulary(tp):
    check_cut(tp, 13, False, chunk=20)


@pytest.mark.parametrize("softcap, bias", [(None, False), (4.0, True)])
def test_rows_of_zeros_behind_the_vocabulary_change_nothing(softcap, bias, monkeypatch):
    labels = torch.tensor(LABELS["most"])

    def made() -> tuple[torch.Tensor, torch.Tensor]:
        head = VocabParallelHead(13, H, ALONE, bias=bias, scale=0.5, softcap=softcap)
        with torch.no_grad():
            head.weight.copy_(tensor(2, 13, H))
            if bias:
                head.bias.copy_(tensor(3, 13))
        hidden = tensor(1, T, H).requires_grad_()
        total = loss_of(hidden, head, labels)
        (1.7 * total).backward()
        return total.detach(), hidden.grad

    wanted = made()
    monkeypatch.setattr(embedding, "padded", lambda rows, place: rows + 3)
    equal(made(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [49155, 1001, 1000])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.125, 30.0)])
def test_a_vocabulary_whose_rows_do_not_end_on_16_bytes(vocab_size, scale, softcap):
    """Their logits stand in rows that do, which the kernels of the loss take; a float32 on a CPU says what is right."""
    found = []
    hidden, weight = tensor(1, 96, 64), tensor(2, vocab_size, 64) / 8
    labels = torch.randint(vocab_size, (96,), generator=torch.Generator().manual_seed(3))
    labels[::7], labels[5] = -100, vocab_size - 1
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        head = VocabParallelHead(vocab_size, 64, Placement(Axis(), False, dtype, device), scale=scale, softcap=softcap)
        with torch.no_grad():
            head.weight.copy_(weight.bfloat16())
        h = hidden.bfloat16().to(device, dtype).requires_grad_()
        if device == "cuda":
            assert head.logits(h.detach()).stride(0) % 8 == 0 and head.weight.shape == (vocab_size, 64)
        total = loss_of(h, head, labels.to(device))
        total.backward()
        found.append((total.item(), h.grad.double().cpu()))
    (wanted, right), (given, grad) = found
    assert given == pytest.approx(wanted, rel=5e-3)
    assert torch.nn.functional.cosine_similarity(grad.flatten(), right.flatten(), dim=0) > 0.9995
