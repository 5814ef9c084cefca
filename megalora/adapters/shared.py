"""Several LoRA adapters as one whose ranks lie side by side, so that a batch may mix their tokens.

A linear's branches are A = [A_1; A_2; ...] and B = [s_1 B_1 | s_2 B_2 | ...]. A token of adapter k keeps its columns of
z = x A^T and has zeros in the others, so it gets s_k z_k B_k^T, and a token of the base nothing: what each adapter
alone gives, but for the order of the sums.

Where adapters come and go, each has a place of one size among the columns (Room), which zeros fill up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.adapters.lora import Adapter
from megalora.errors import UserError


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


@dataclass(frozen=True)
class Room:
    """Places for `adapters` adapters, of `rank` columns each, on the linears of these names."""

    adapters: int
    rank: int
    linears: tuple[str, ...]

    def empty(self) -> SharedAdapters:
        """Return the adapter that has these places, with no tensors yet."""
        owners = [number for number in range(1, self.adapters + 1) for _ in range(self.rank)]
        ranks = {name: Adapter(len(owners), 1.0, 0.0) for name in self.linears}
        return SharedAdapters(ResolvedLora(LoraConfig(), ranks), {}, dict.fromkeys(self.linears, owners))

    def fit(self, lora: ResolvedLora, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return an adapter's factors A [r, in] and s B [out, r] by parameter name. Raises UserError without room."""
        known, found = set(self.linears), {}
        for name, adapter in lora.adapters.items():
            if name not in known:
                raise UserError(
                    f"{name} is adapted, a linear of experts, for which --max_adapters has no room",
                    "start the server with --room_for_experts true",
                )
            if adapter.r > self.rank:
                raise UserError(
                    f"{name} has rank {adapter.r}, but there is room for {self.rank}",
                    f"start the server with --max_adapter_rank {adapter.r}",
                )
            found[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_A.weight"]
            found[f"{name}.lora_B.weight"] = _scaled(tensors[f"{name}.lora_B.weight"], adapter.scaling)
        return found

    @staticmethod
    def dim(parameter: str) -> int:
        """Return the dimension of a factor along which the adapters lie side by side."""
        return int(parameter.endswith("lora_B.weight"))


def _scaled(B: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return s B in float32 or wider, so that it rounds once, beside the weight."""
    return B.to(torch.promote_types(B.dtype, torch.float32)) * scaling


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
            B = _scaled(tensors[f"{name}.lora_B.weight"], adapter.scaling)
            parts.setdefault(f"{name}.lora_B.weight", []).append(B)
    tensors = {name: torch.cat(some, dim=Room.dim(name)) for name, some in parts.items()}
    ranks = {name: Adapter(len(columns), 1.0, 0.0) for name, columns in owners.items()}
    return SharedAdapters(ResolvedLora(LoraConfig(), ranks), tensors, owners)
