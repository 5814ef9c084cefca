"""What the plan says that Mamba-2 holds while it runs, against what torch allocates."""

import pytest
import torch
from allocated import peak

from megalora.ops.delta_rule import Documents
from megalora.ops.mamba_mixer import MambaWeights, Sizes, mamba_mixer
from megalora.planning.groups import Group
from megalora.planning.mamba import _made
from megalora.planning.mixers import StateSpace

TOKENS = 512


@pytest.mark.parametrize("sizes", [Sizes(8, 1, 64, 128), Sizes(8, 4, 64, 128), Sizes(6, 1, 32, 256)])
def test_bytes_at_once(sizes, tmp_path):
    heads, inner = sizes.heads, sizes.widths[0]
    norm = torch.ones(inner).bfloat16()
    of_heads = [torch.zeros(heads) for _ in range(3)]
    convolution = torch.ones(sizes.channels, 4).bfloat16()
    weights = MambaWeights(convolution, torch.ones(sizes.channels).bfloat16(), *of_heads, norm, 1e-6, inner)
    y = torch.randn(TOKENS, sum(sizes.widths)).bfloat16().requires_grad_()
    out, forward = peak(lambda: mamba_mixer(y, sizes, weights, Documents.of([0, TOKENS])), tmp_path)
    _, backward = peak(lambda: torch.autograd.grad(out, y, torch.ones_like(out)), tmp_path)
    none = Group(1, (1,), (0,), 0, False, 0, 0)
    made = TOKENS * heads * _made(StateSpace(none, none, *sizes, True, 0))
    assert 0.85 * made <= backward <= 1.15 * made and 0.8 * made <= 2 * forward <= 1.2 * made
