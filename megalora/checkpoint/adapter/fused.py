"""Adapters of experts as peft keeps them where transformers has the experts of a layer in one parameter
(`target_parameters`), and as ours: one for each expert.

peft wraps such a parameter P [E, ...] of module X; two of them are wrapped one in the other, the first innermost:

    X.base_layer.lora_A.weight, X.base_layer.lora_B.weight   of gate_up_proj, where down_proj is adapted too
    X.lora_A.weight, X.lora_B.weight                         of down_proj, or of the only one

lora_A [E r, in] has the rows of expert 0 first; lora_B [out, r E] the columns of rank 0 of all experts first
(peft/tuners/lora/layer.py, ParamWrapper.get_delta_weight). Ours: X.{e}.gate_up_proj.lora_A.weight [r, in], ...
Of a module that does not say that its parameters are [E, in, out] (Llama4TextExperts: it lacks `is_transposed`) peft
takes them for [E, out, in]: what it calls lora_A is our lora_B, transposed, and the other way round.

Legend: E experts, r rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from megalora.adapters.config import LoraConfig
from megalora.adapters.lora import Adapter
from megalora.adapters.patterns import Patterns
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.errors import UserError

_ORDER = ("gate_up_proj", "down_proj")  # as transformers registers them: the first is the innermost
_INNER, _FACTOR = ".base_layer", re.compile(r"(.*)\.lora_([AB])\.weight")
_TURNED = "feed_forward.experts"  # the end of the names of modules whose factors change places
_OF_EXPERT = re.compile(r"(.*)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
Tensors = dict[str, torch.Tensor]
Stack = tuple[str, str]  # the module X and the name of its parameter


def _wrapped(parameters: Any, module: str) -> list[str]:
    """Return which parameters of a module `target_parameters` names, innermost first."""
    return [name for name in _ORDER if any(f".{module}.{name}".endswith(f".{one}") for one in parameters)]


def is_fused(fields: Mapping[str, Any], module: str) -> bool:
    """Return whether peft adapts parameters of `module` (X) itself, by the fields of its config."""
    return bool(_wrapped(fields.get("target_parameters") or (), module))


def by_expert(tensors: Tensors, fields: Mapping[str, Any], where: str) -> tuple[Tensors, dict[str, Any]]:
    """Return an adapter of peft, without its prefix, with one adapter for each expert, and the fields with patterns of
    rank and alpha that mean the experts. Raises UserError.

    fields  of its adapter_config.json
    """
    parameters = fields.get("target_parameters")
    if not parameters:
        return tensors, dict(fields)
    lora = LoraConfig.from_dict(fields, where, trained=True)
    found: Tensors = {}
    stacks: dict[Stack, list[str]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        module = match[1].removesuffix(_INNER) if match is not None else ""
        wrapped = _wrapped(parameters, module) if match is not None else []
        if match is None or not wrapped:
            found[name] = tensor
            continue
        inner = match[1].endswith(_INNER)
        if inner and len(wrapped) < 2:
            raise UserError(f"{where}: {name}: target_parameters names one parameter only", "save the adapter again")
        leaf = wrapped[0] if inner else wrapped[-1]
        r = lora.of_names([f"{module}.{leaf}"])[f"{module}.{leaf}"].r
        total = tensor.shape[0 if match[2] == "A" else -1]
        if tensor.dim() != 2 or total % r:
            raise UserError(f"{where}: {name} {list(tensor.shape)} is not of experts of rank {r}", "save it again")
        count = total // r
        stacks[module, leaf] = [f"{module}.{e}.{leaf}" for e in range(count)]
        for e, linear in enumerate(stacks[module, leaf]):
            part = tensor[e * r : (e + 1) * r] if match[2] == "A" else tensor[:, e::count]
            factor, part = (_other(match[2]), part.T) if module.endswith(_TURNED) else (match[2], part)
            found[f"{linear}.lora_{factor}.weight"] = part.contiguous()
    return found, _of_experts(fields, lora, stacks, {stack: ".".join(stack) for stack in stacks})


def _of_experts(
    fields: Mapping[str, Any], lora: LoraConfig, linears: Mapping[Stack, Sequence[str]], before: Mapping[Stack, str]
) -> dict[str, Any]:
    """Return the fields with patterns that give linears of experts what they had by another name.

    linears  those of all experts, by module and end of their names; before: the name that they had
    """
    fields, patterns = dict(fields), Patterns()
    wanted = lora.of_names([*before.values()])
    ours = lora.of_names([linear for names in linears.values() for linear in names])
    for name in ("rank_pattern", "alpha_pattern"):  # a pattern of the names before means no linear any more
        fields[name] = {
            pattern: value
            for pattern, value in (fields.get(name) or {}).items()
            if not any(patterns.fits_end(pattern, one) for one in before.values())
            or any(patterns.fits_end(pattern, linear) for linear in ours)
        }
    adapters = {stack: wanted[before[stack]] for stack in linears}
    other = {stack for stack, names in linears.items() if any(ours[linear] != adapters[stack] for linear in names)}
    return fields | _patterns(fields, lora, adapters, other, r"\.\d+")


def _patterns(
    fields: Mapping[str, Any],
    lora: LoraConfig,
    adapters: Mapping[Stack, Adapter],
    other: Collection[Stack],
    expert: str = "",
) -> dict[str, Any]:
    """Return rank_pattern and alpha_pattern of the fields with first those of the stacks `other`.

    adapters  of all stacks; expert: what stands between the names of the module and its parameter
    """
    first: dict[str, Adapter] = {}
    power = math.sqrt if lora.use_rslora else float
    for module, leaf in sorted(other):
        adapter, tail = adapters[module, leaf], module.rpartition(".")[2]
        alike = all(one == adapter for (_, name), one in adapters.items() if name == leaf)
        first[rf"{tail if alike else re.escape(module)}{expert}\.{leaf}"] = adapter
    found: dict[str, dict[str, float]] = {
        "rank_pattern": {pattern: adapter.r for pattern, adapter in first.items()},
        "alpha_pattern": {pattern: adapter.scaling * power(adapter.r) for pattern, adapter in first.items()},
    }
    later = {name: {p: v for p, v in (fields.get(name) or {}).items() if p not in first} for name in found}
    return {name: found[name] | later[name] for name in found}


def _other(factor: str) -> str:
    return "B" if factor == "A" else "A"


def fused(
    tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any], counts: Mapping[str, int] | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Return an adapter with one for each expert as peft keeps it, without its prefix, and its fields: the inverse of
    `by_expert`.

    peft has one rank and one scale for a parameter: lower ranks are filled up with zeros, B carries the ratio
    of scales, and an expert without an adapter gets one of zeros. What they add to the weights stays as it was.

    counts  the experts that each parameter holds, by its name; None: the model is not known
    Raises UserError where the model is not known and there may be experts without an adapter.
    """
    parameters = fields.get("target_parameters")
    if not parameters:
        return dict(tensors), dict(fields)
    lora, out = LoraConfig.from_dict(fields, trained=True), Tensors()
    groups: dict[Stack, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _OF_EXPERT.fullmatch(name)
        if match is None or match[3] not in _wrapped(parameters, match[1]):
            out[name] = tensor
            continue
        groups.setdefault((match[1], match[3]), {}).setdefault(int(match[2]), {})[match[4]] = tensor
    adapters: dict[Stack, Adapter] = {}
    for (module, leaf), experts in groups.items():
        names = {e: f"{module}.{e}.{leaf}" for e in sorted(experts)}
        own = lora.of_names([*names.values()])
        scaling, _ = Counter(adapter.scaling for adapter in own.values()).most_common(1)[0]
        whole = adapters[module, leaf] = replace(
            own[names[min(names)]], r=max(a.r for a in own.values()), scaling=scaling
        )
        count = count_of(f"{module}.{leaf}", experts, fields, counts)
        zeros = {f: torch.zeros_like(one) for f, one in experts[min(names)].items()}
        parts = [
            as_of(experts[e], own[names[e]], whole) if e in experts else as_of(zeros, whole, whole)
            for e in range(count)
        ]
        wrapped = _wrapped(parameters, module)
        inner = _INNER if len(wrapped) > 1 and leaf == wrapped[0] else ""
        for factor in "AB":
            turned = module.endswith(_TURNED)
            of_experts = [part[_other(factor)].T if turned else part[factor] for part in parts]
            joined = torch.cat(of_experts) if factor == "A" else torch.stack(of_experts, 2).flatten(1)
            out[f"{module}{inner}.lora_{factor}.weight"] = joined
    named = lora.of_names([".".join(stack) for stack in adapters])
    other = [stack for stack, adapter in adapters.items() if named[".".join(stack)] != adapter]
    return out, {**fields, **_patterns(fields, lora, adapters, other)}


def as_of(factors: Mapping[str, torch.Tensor], own: Adapter, whole: Adapter) -> dict[str, torch.Tensor]:
    """Return A [r, in] and B [out, r] of an adapter as those of one of the rank and the scale of `whole`."""
    a, b = factors["A"], factors["B"]
    if own.scaling != whole.scaling:
        b = (b.double() * (own.scaling / whole.scaling)).to(b.dtype)
    room = whole.r - a.shape[0]
    return {"A": pad(a, (0, 0, 0, room)), "B": pad(b, (0, room))}


def count_of(
    parameter: str, experts: Collection[int], fields: Mapping[str, Any], counts: Mapping[str, int] | None
) -> int:
    """Return how many experts a parameter holds."""
    if counts is not None and parameter in counts:
        return counts[parameter]
    if fields.get("exclude_modules") or len(experts) <= max(experts):
        raise UserError(
            f"lora_config: experts of {parameter} have no adapter, and only the model says how many there are",
            "name its folder: megalora convert adapter to-peft --base MODEL",
        )
    return len(experts)


def apart(adapter: AdapterCheckpoint, experts: Mapping[str, tuple[str, ...]]) -> AdapterCheckpoint:
    """Return an adapter of a model whose files have gate and up of an expert apart, where peft had them in one.

    experts  the one name -> those of the model (ModelSpec.fused_experts). Gate and up get the same lora_A, and each its
             rows of lora_B, which is the same branch
    """
    found: Tensors = {}
    renamed: dict[str, str] = {}
    for name, tensor in adapter.tensors.items():
        linear, _, end = name.rpartition(".lora_")
        names = experts.get(linear, ())
        if not names or not adapter.lora_config.get("target_parameters"):
            found[name] = tensor
            continue
        parts = [tensor] * len(names) if end.startswith("A") else tensor.chunk(len(names))
        found |= {f"{ours}.lora_{end}": part.clone() for ours, part in zip(names, parts, strict=True)}
        renamed |= dict.fromkeys(names, linear)
    if not renamed:
        return adapter
    fields = {name: value for name, value in adapter.lora_config.items() if name != "target_parameters"}
    adapted = {match[1] for name in found if (match := _FACTOR.fullmatch(name)) is not None}
    patterns = {re.escape(name) for name in adapted - renamed.keys()}
    linears: dict[Stack, list[str]] = {}
    for name in renamed:
        expert, _, leaf = name.rpartition(".")
        module = expert.rpartition(".")[0]
        linears.setdefault((module, leaf), []).append(name)
        patterns.add(rf"{re.escape(module)}\.\d+\.{leaf}")
    before = {stack: renamed[names[0]] for stack, names in linears.items()}
    fields = _of_experts(fields, LoraConfig.from_dict(fields, adapter.where, trained=True), linears, before)
    return replace(adapter, tensors=found, lora_config=fields | {"target_modules": "|".join(sorted(patterns))})
