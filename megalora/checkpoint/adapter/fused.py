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

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megalora.adapters.config import LoraConfig
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.errors import UserError

_ORDER = ("gate_up_proj", "down_proj")  # as transformers registers them: the first is the innermost
_INNER, _FACTOR = ".base_layer", re.compile(r"(.*)\.lora_([AB])\.weight")
_TURNED = "feed_forward.experts"  # the end of the names of modules whose factors change places
_OF_EXPERT = re.compile(r"(.*)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
Tensors = dict[str, torch.Tensor]


def _wrapped(parameters: Any, module: str) -> list[str]:
    """Return which parameters of a module `target_parameters` names, innermost first."""
    return [name for name in _ORDER if any(f".{module}.{name}".endswith(f".{one}") for one in parameters)]


def is_fused(fields: Mapping[str, Any], module: str) -> bool:
    """Return whether peft adapts parameters of `module` (X) itself, by the fields of its config."""
    return bool(_wrapped(fields.get("target_parameters") or (), module))


def by_expert(tensors: Tensors, fields: Mapping[str, Any], where: str) -> Tensors:
    """Return an adapter of peft, without its prefix, with one adapter for each expert. Raises UserError.

    fields  of its adapter_config.json
    """
    parameters = fields.get("target_parameters")
    if not parameters:
        return tensors
    found: Tensors = {}
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
        r = LoraConfig.from_dict(fields, where, trained=True).of_names([f"{module}.{leaf}"])[f"{module}.{leaf}"].r
        total = tensor.shape[0 if match[2] == "A" else -1]
        if tensor.dim() != 2 or total % r:
            raise UserError(f"{where}: {name} {list(tensor.shape)} is not of experts of rank {r}", "save it again")
        count = total // r
        for e in range(count):
            part = tensor[e * r : (e + 1) * r] if match[2] == "A" else tensor[:, e::count]
            factor, part = (_other(match[2]), part.T) if module.endswith(_TURNED) else (match[2], part)
            found[f"{module}.{e}.{leaf}.lora_{factor}.weight"] = part.contiguous()
    return found


def _other(factor: str) -> str:
    return "B" if factor == "A" else "A"


def fused(tensors: Mapping[str, torch.Tensor], fields: Mapping[str, Any]) -> Tensors:
    """Return an adapter with one for each expert as peft keeps it, without its prefix: the inverse of `by_expert`.

    Raises UserError where experts of one layer differ in rank or scale, or some have no adapter.
    """
    parameters = fields.get("target_parameters")
    if not parameters:
        return dict(tensors)
    out: Tensors = {}
    groups: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _OF_EXPERT.fullmatch(name)
        if match is None or match[3] not in _wrapped(parameters, match[1]):
            out[name] = tensor
            continue
        groups.setdefault((match[1], match[3], match[4]), {})[int(match[2])] = tensor
    lora = LoraConfig.from_dict(fields)
    for (module, leaf, factor), experts in groups.items():
        names = [f"{module}.{e}.{leaf}" for e in experts]
        adapters = {lora.of_names([name])[name] for name in names}
        if len(adapters) > 1 or sorted(experts) != list(range(len(experts))):
            raise UserError(
                f"lora_config: the experts of {module} have adapters of several ranks or scales, or some have none, "
                f"which peft has no form for",
                "merge the adapter (megalora convert adapter merge)",
            )
        parts = [experts[e] for e in sorted(experts)]
        if module.endswith(_TURNED):
            factor, parts = _other(factor), [part.T for part in parts]
        whole = torch.cat(parts) if factor == "A" else torch.stack(parts, 2).flatten(1)
        wrapped = _wrapped(parameters, module)
        inner = _INNER if len(wrapped) > 1 and leaf == wrapped[0] else ""
        out[f"{module}{inner}.lora_{factor}.weight"] = whole
    return out


def apart(adapter: AdapterCheckpoint, experts: Mapping[str, tuple[str, ...]]) -> AdapterCheckpoint:
    """Return an adapter of a model whose files have gate and up of an expert apart, where peft had them in one.

    experts  the one name -> those of the model (ModelSpec.fused_experts). Gate and up get the same lora_A, and each its
             rows of lora_B, which is the same branch
    """
    found: Tensors = {}
    renamed: set[str] = set()
    for name, tensor in adapter.tensors.items():
        linear, _, end = name.rpartition(".lora_")
        names = experts.get(linear, ())
        if not names or not adapter.lora_config.get("target_parameters"):
            found[name] = tensor
            continue
        parts = [tensor] * len(names) if end.startswith("A") else tensor.chunk(len(names))
        found |= {f"{ours}.lora_{end}": part.clone() for ours, part in zip(names, parts, strict=True)}
        renamed |= set(names)
    if not renamed:
        return adapter
    fields = {name: value for name, value in adapter.lora_config.items() if name != "target_parameters"}
    adapted = {match[1] for name in found if (match := _FACTOR.fullmatch(name)) is not None}
    patterns = {re.escape(name) for name in adapted - renamed}
    for name in renamed:
        expert, _, leaf = name.rpartition(".")
        patterns.add(rf"{re.escape(expert.rpartition('.')[0])}\.\d+\.{leaf}")
    targets = sorted(patterns)
    return replace(adapter, tensors=found, lora_config=fields | {"target_modules": "|".join(targets)})
