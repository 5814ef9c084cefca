"""Factors that all experts of a layer share: `expert_lora` of lora_config.json, which peft has no word for.

Such a factor is one parameter, named without the expert: `mlp.experts.gate_proj.lora_A.weight`. Wherever an adapter
leaves a run it is written for each expert (`by_expert`), which is the same adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from megalora.adapters.lora import Adapter
from megalora.errors import UserError

SHARED: Mapping[str, str] = {"per_expert": "", "shared_a": "A", "shared": "AB"}
"""The values of expert_lora, and the factors that experts share there."""

_LINEAR = re.compile(r"(.*\.experts)\.\d+\.(\w+)")
_FACTOR = re.compile(r"(.*\.experts)\.([A-Za-z_]\w*)(\.lora_[AB]\.weight)")


def holder(linear: str, factor: str, mode: str) -> str:
    """Return the full name of what has a factor ("A" or "B") of a linear: the linear, or that of all experts in one."""
    found = _LINEAR.fullmatch(linear)
    return linear if found is None or factor not in SHARED[mode] else f"{found[1]}.{found[2]}"


def by_expert(
    tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an adapter, and its lora_config, with each shared factor under the name of each expert."""
    count = fields.get("expert_count") or 0
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name) if count else None
        if match is None:
            found[name] = tensor
        else:  # a file holds each for itself
            found |= {f"{match[1]}.{e}.{match[2]}{match[3]}": tensor.clone() for e in range(count)}
    return found, {name: value for name, value in fields.items() if name not in ("expert_lora", "expert_count")}


def in_common(tensors: Mapping[str, torch.Tensor], mode: str, where: str) -> dict[str, torch.Tensor]:
    """Return an adapter with the factors that experts share in one each: the inverse of `by_expert`.

    Raises UserError where experts have factors of their own there.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, end = name.rpartition(".lora_")
        ours = f"{holder(linear, end[:1], mode)}.lora_{end}" if end.endswith(".weight") else name
        if not torch.equal(found.setdefault(ours, tensor), tensor):
            raise UserError(
                f"adapter {where}: experts have factors of their own ({name}), but lora_config says expert_lora = "
                f"{mode!r}",
                "set it to per_expert, or start from another adapter",
            )
    return found


def check_field(values: Mapping[str, Any], need: Callable[[str, bool, str], None]) -> None:
    """Raise UserError for values that are not valid. need: raises, given (field, whether it is good, what to give)."""
    need("expert_lora", values.get("expert_lora") in SHARED, ", ".join(SHARED))
    count = values.get("expert_count")
    whole = isinstance(count, int) and not isinstance(count, bool) and 0 < count <= 1 << 14
    need("expert_count", count is None or whole, "the number of experts of a layer, or leave it out")


def factor_keys(linear: str, mode: str) -> tuple[str, str]:
    """Return the full names of lora_A and lora_B of a linear."""
    return f"{holder(linear, 'A', mode)}.lora_A.weight", f"{holder(linear, 'B', mode)}.lora_B.weight"


def counted(config: Any, adapters: Mapping[str, Adapter], linears: Collection[str]) -> Any:
    """Return a LoraConfig that says how many experts share a factor, where they do.

    adapters  by name of the adapted linears; linears: the names of all
    Raises UserError where they cannot: some have no adapter, or another rank, or none has one.
    """
    mode = config.expert_lora
    if mode == "per_expert":
        return replace(config, expert_count=None)
    said = f"lora_config: expert_lora = {mode!r}"
    if config.init_lora_weights == "orthogonal":
        raise UserError(f"{said} goes with no init_lora_weights = 'orthogonal'", "leave one out")
    kinds: dict[str, list[str]] = {}
    for name in linears:
        if (found := _LINEAR.fullmatch(name)) is not None:
            kinds.setdefault(f"{found[1]}.{found[2]}", []).append(name)
    adapted = {kind: names for kind, names in kinds.items() if not adapters.keys().isdisjoint(names)}
    if not adapted:
        raise UserError(f"{said}, but no linear of experts is adapted", "name some in target_modules, or remove it")
    for kind, names in adapted.items():
        ranks = {name: adapters[name].r if name in adapters else 0 for name in names}
        if len(set(ranks.values())) > 1:
            low = min(ranks, key=lambda name: ranks[name])
            raise UserError(
                f"{said}: the experts of {kind} have adapters of several ranks ({low}: {ranks[low]})",
                "give them one rank, or per_expert",
            )
    return replace(config, expert_count=len(next(iter(adapted.values()))))
