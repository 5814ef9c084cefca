"""What the plan says that linear attention holds while it runs, against what torch allocates."""

import pytest
import torch
from allocated import peak

from megalora.ops.delta_mixer import DeltaWeights, Heads, delta_mixer
from megalora.ops.delta_rule import Documents
from megalora.planning.delta import _made, _made_by_kernels
from megalora.planning.groups import Group
from megalora.planning.mixers import DeltaAttention

TOKENS = 512


@pytest.mark.parametrize("heads", [Heads(2, 2, 128, 128), Heads(1, 4, 128, 64), Heads(3, 1, 64, 64)])
def test_bytes_at_once(heads, tmp_path):
    channels, values = heads.channels, heads.groups * heads.repeats
    norm = torch.ones(heads.value, dtype=torch.bfloat16)
    weights = DeltaWeights(torch.ones(channels, 4).bfloat16(), torch.zeros(values), torch.zeros(values), norm, 1e-6)
    y = torch.randn(TOKENS, sum(heads.widths)).bfloat16().requires_grad_()
    out, forward = peak(lambda: delta_mixer(y, heads, weights, Documents.of([0, TOKENS])), tmp_path)
    _, backward = peak(lambda: torch.autograd.grad(out, y, torch.ones_like(out)), tmp_path)
    none = Group(1, (1,), (0,), 0, False, 0, 0)
    made = TOKENS * values * _made(DeltaAttention(none, none, *heads, norms=0))
    assert 0.85 * made <= backward <= 1.15 * made and 0.8 * made <= 2 * forward <= 1.2 * made


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(4, 2, 128, 128), Heads(2, 4, 16, 128), Heads(6, 1, 128, 128)])
def test_bytes_at_once_of_kernels(heads):
    values, tokens = heads.groups * heads.repeats, 8 * TOKENS
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    decay = torch.zeros(values, device="cuda")
    weights = DeltaWeights(torch.ones(heads.channels, 4, **kind), decay, decay, torch.ones(heads.value, **kind), 1e-6)
    y = torch.randn(tokens, sum(heads.widths), **kind).requires_grad_()
    documents = Documents.of([0, tokens], "cuda")
    grad = torch.ones(tokens, heads.widths[2], **kind)

    def held(run) -> tuple[torch.Tensor, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        return found, torch.cuda.max_memory_allocated() - before

    out, forward = held(lambda: delta_mixer(y, heads, weights, documents))
    _, backward = held(lambda: torch.autograd.grad(out, y, grad))
    none = Group(1, (1,), (0,), 0, False, 0, 0)
    counted = _made_by_kernels(DeltaAttention(none, none, *heads, norms=0))
    beside = out.nbytes, y.nbytes  # the result, and the gradient
    for most, one, own in zip((forward, backward), counted, beside, strict=True):
        assert 0.9 * one <= (most - own) / (tokens * values) <= 1.1 * one
