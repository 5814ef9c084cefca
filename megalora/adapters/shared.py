"""Several LoRA adapters as one whose ranks lie side by side, so that a batch may mix their tokens.

A linear's branches are A = [A_1; A_2; ...] and B = [s_1 B_1 | s_2 B_2 | ...]. A token of adapter k keeps its columns of
z = x A^T and has zeros in the others, so it gets s_k z_k B_k^T, and a token of the base nothing: what each adapter
alone gives, but for the order of the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.adapters.lora import Adapter


@dataclass(frozen=True)
class SharedAdapters:
    """One adapter made of several.

    lora     of the model: rank the sum of theirs, scaling 1
    tensors  whole, by parameter name, as of any adapter
    owners   by the name of a linear, which adapter (from 1) each column of its branch belongs to
    """

    lora: ResolvedLora
    tensors: Mapping[str, torch.Tensor]
    owners: Mapping[str, Sequence[int]]


def share(adapters: Sequence[tuple[ResolvedLora, Mapping[str, torch.Tensor]]]) -> SharedAdapters:
    """Return `adapters`, each with its tensors lora_A [r, in] and lora_B [out, r] by parameter name, as one.

    They train no biases and no magnitudes (DoRA), which each token would need of its own.
    """
    owners: dict[str, list[int]] = {}
    parts: dict[str, list[torch.Tensor]] = {}
    for number, (lora, tensors) in enumerate(adapters, 1):
        config = lora.config
        assert config.bias == "none" and not config.use_dora and not config.lora_bias, config
        for name, adapter in lora.adapters.items():
            owners.setdefault(name, []).extend([number] * adapter.r)
            parts.setdefault(f"{name}.lora_A.weight", []).append(tensors[f"{name}.lora_A.weight"])
            B = tensors[f"{name}.lora_B.weight"]
            B = B.to(torch.promote_types(B.dtype, torch.float32))  # so that s B rounds once, beside the weight
            parts.setdefault(f"{name}.lora_B.weight", []).append(B * adapter.scaling)
    tensors = {name: torch.cat(some, dim=int(name.endswith("lora_B.weight"))) for name, some in parts.items()}
    ranks = {name: Adapter(len(columns), 1.0, 0.0) for name, columns in owners.items()}
    return SharedAdapters(ResolvedLora(LoraConfig(), ranks), tensors, owners)
