"""Adapters of experts that files have apart and transformers in one parameter: peft joins them, if all are alike.

Where it loads an adapter of such experts, each under its own name, it stacks them and takes the config's r and
lora_alpha for all (peft/utils/transformers_weight_conversion.py): other ranks do not load, other alphas it does not
apply. Gate and up it joins to one of twice the rank, whose scale with use_rslora is another; it refuses one of them
alone, and without an adapter of down it passes over both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from megalora.adapters.config import LoraConfig
from megalora.adapters.lora import Adapter
from megalora.checkpoint.adapter.fused import Stack, Tensors, as_of, count_of

_LINEARS = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")  # of an expert
_OF_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
_FACTORS = (".lora_A.weight", ".lora_embedding_A")
_PLAIN = re.compile(r"\w+")


def alike(
    tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], counts: Mapping[str, int] | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Return an adapter whose experts have all one rank and one scale, those of the config, and its fields.

    As `fused`: lower ranks are filled up with zeros, B carries the ratio of scales, and experts without an adapter get
    zeros; so do the others of gate, up and down where one of the first two has one. use_rslora becomes an alpha. An
    adapter of experts that are alike comes back as it is.

    counts  the experts of each linear, by its name without their number; None: the model is not known
    Raises UserError where the model is not known and there may be experts without an adapter.
    """
    lora = LoraConfig.from_dict(fields, trained=True)
    out, groups = dict(tensors), dict[Stack, dict[int, dict[str, torch.Tensor]]]()
    for name in tensors:
        if (match := _OF_EXPERT.fullmatch(name)) is not None:
            factors = groups.setdefault((match[1], match[3]), {}).setdefault(int(match[2]), {})
            factors[match[4]] = out.pop(name)
    if not groups:
        return out, dict(fields)
    own = lora.of_names([f"{module}.{e}.{leaf}" for (module, leaf), experts in groups.items() for e in experts])
    sizes = {stack: count_of(".".join(stack), experts, fields, counts) for stack, experts in groups.items()}
    lacking = _lacking(groups, counts)
    plain = replace(next(iter(own.values())), r=lora.r, scaling=lora.lora_alpha / lora.r)
    complete = not lacking and all(len(groups[stack]) == size for stack, size in sizes.items())
    if complete and not lora.use_rslora and {*own.values()} == {plain}:
        return dict(tensors), dict(fields)
    scaling, _ = Counter(adapter.scaling for adapter in own.values()).most_common(1)[0]
    whole = replace(plain, r=max(adapter.r for adapter in own.values()), scaling=scaling)
    for (module, leaf), experts in groups.items():
        like = next(iter(experts.values()))
        zeros = as_of({factor: torch.zeros_like(one) for factor, one in like.items()}, whole, whole)
        made = {e: as_of(factors, own[f"{module}.{e}.{leaf}"], whole) for e, factors in experts.items()}
        for e in range(sizes[module, leaf]):
            for factor, tensor in made.get(e, zeros).items():
                out[f"{module}.{e}.{leaf}.lora_{factor}.weight"] = tensor.clone()
            for other, turned in lacking.get((module, leaf), ()):  # down reads what gate makes, and makes what it reads
                shapes = {f: zeros["BA"["AB".index(f)]].T.shape if turned else zeros[f].shape for f in "AB"}
                for factor, shape in shapes.items():
                    out[f"{module}.{e}.{other}.lora_{factor}.weight"] = like["A"].new_zeros(shape)
    fields = {**fields, "r": whole.r, "lora_alpha": scaling * whole.r, "use_rslora": False}
    return out, fields | _of_others(out, lora, whole)


def _lacking(groups: Collection[Stack], counts: Mapping[str, int] | None) -> dict[Stack, list[tuple[str, bool]]]:
    """Return which other linears of experts are to have adapters, by one that has: (name, whether it is down).

    Of a model that is not known gate alone tells that there is one.
    """
    found: dict[Stack, list[tuple[str, bool]]] = {}
    for module in {module for module, _ in groups}:
        for gate, up, down in _LINEARS:
            gated = (module, gate) in groups if counts is None else f"{module}.{gate}" in counts
            there = [leaf for leaf in (gate, up) if gated and (module, leaf) in groups]
            wanted = [(other, other == down) for other in (gate, up, down) if (module, other) not in groups]
            found |= {(module, there[0]): wanted} if there and wanted else {}
    return found


def _of_others(tensors: Mapping[str, torch.Tensor], lora: LoraConfig, whole: Adapter) -> dict[str, Any]:
    """Return rank_pattern and alpha_pattern that keep the adapters of all that are no experts as they are."""
    of_experts = {match[3] for name in tensors if (match := _OF_EXPERT.fullmatch(name)) is not None}
    linears = {name.removesuffix(end) for name in tensors if not _OF_EXPERT.fullmatch(name) for end in _FACTORS
               if name.endswith(end)}  # fmt: skip
    adapters = lora.of_names(sorted(linears))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, adapter in adapters.items():
        leaf = name.rpartition(".")[2]
        same = all(one == adapter for other, one in adapters.items() if other.rpartition(".")[2] == leaf)
        pattern = leaf if same and leaf not in of_experts and _PLAIN.fullmatch(leaf) else re.escape(name)
        if adapter.r != whole.r:
            ranks[pattern] = adapter.r
        if (adapter.r, adapter.scaling) != (whole.r, whole.scaling):
            alphas[pattern] = adapter.scaling * adapter.r
    return {"rank_pattern": ranks, "alpha_pattern": alphas}
