"""Adapters made of adapters, of models, and of a base: sums, differences, comparisons, and starts that change the base.

In one process, on the CPU, one linear at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalora.adapters.config import PREPARED, LoraConfig, ResolvedLora, lora_fields
from megalora.adapters.deltas import (
    Branch,
    linear_sum,
    nearest,
    norm,
    orthonormal,
    principal,
    side_by_side,
    truncated,
)
from megalora.building import resolve_lora
from megalora.checkpoint.adapter.merge import MergedWeights
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.peft import write_peft
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.checkpoint.base.source import BaseWeights
from megalora.checkpoint.base.transfer import plan_hf, tensor_types, transfer
from megalora.checkpoint.target import companions
from megalora.convert import (
    as_in_files,
    config_of,
    copy_companions,
    max_file_bytes,
    read_base,
    say_done,
    target_beside,
    target_of,
    write_adapter,
    write_its_tokenizer,
)
from megalora.errors import UserError
from megalora.flags import Conversion
from megalora.identity import progress
from megalora.models.spec import ModelSpec

INITIAL = "initial"  # folder of the initial adapter, in that of the changed base


# ---- what adapters add ----


def _branches(adapter: AdapterCheckpoint) -> dict[str, Branch]:
    """Return what a plain LoRA adds to each linear, by name. Raises UserError where it is another kind of adapter."""
    config = LoraConfig.from_dict(adapter.lora_config, adapter.where)
    suffix = ".lora_A.weight"
    names = [name.removesuffix(suffix) for name in adapter.tensors if name.endswith(suffix)]
    if 2 * len(names) != len(adapter.tensors) or config.use_dora:
        raise UserError(
            f"adapter {adapter.where}: has more than lora_A and lora_B of linears (DoRA, biases, modules trained in "
            "full)",
            "merge it into the model instead (megalora convert adapter merge)",
        )
    adapters = config.of_names(names)
    found = {}
    for name in names:
        A, B = (adapter.tensors[f"{name}.lora_{factor}.weight"] for factor in "AB")
        wide = torch.promote_types(A.dtype, torch.float32)
        found[name] = Branch(A.to(wide), B.to(wide) * adapters[name].scaling, adapters[name].scaling)
    return found


def _check_one_base(adapters: Sequence[AdapterCheckpoint]) -> None:
    """Raise UserError where two adapters come from runs on different models: their sum is an adapter of neither."""
    runs = [(one.where, run.identity.get("model", "(none)")) for one in adapters if (run := progress(one))]
    for where, model in runs[1:]:
        if model != runs[0][1]:
            raise UserError(
                f"adapters {runs[0][0]} ({runs[0][1]}) and {where} ({model}) were trained on different models",
                "combine adapters of one model; or, to combine them all the same, name the peft folders of their runs",
            )


def _plain(branches: Mapping[str, Branch], like: Mapping[str, Any], where: str) -> AdapterCheckpoint:
    """Return branches as an adapter whose scaling is 1: alpha is r. like: fields that are kept."""
    ranks = {name: branch.rank for name, branch in branches.items()}
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    names = ("base_model_name_or_path", "task_type", "fan_in_fan_out", "target_parameters", "exclude_modules")
    kept = {name: like[name] for name in names if name in like}
    fields = kept | {"r": r, "lora_alpha": r, "target_modules": sorted(branches)}
    fields |= {"rank_pattern": others, "alpha_pattern": others}
    tensors = {}
    for name, branch in branches.items():
        tensors[f"{name}.lora_A.weight"] = branch.A.contiguous()
        tensors[f"{name}.lora_B.weight"] = branch.sB.contiguous()
    base = kept.get("base_model_name_or_path")
    config = LoraConfig.from_dict({n: v for n, v in fields.items() if n != "base_model_name_or_path"}).to_dict()
    return AdapterCheckpoint(config | ({"base_model_name_or_path": base} if base else {}), tensors, where=where)


def _write(arguments: Conversion, adapter: AdapterCheckpoint, *sources: str) -> None:
    target = target_beside(adapter, arguments, *sources)
    config = config_of(adapter, arguments)

    def write(folder: Path) -> None:
        experts = None if config is None else config.expert_counts
        write_peft(folder, adapter.tensors, adapter.lora_config, experts=experts)
        write_its_tokenizer(adapter, arguments, folder)

    write_adapter(arguments, target, adapter, write)


# ---- commands ----


def _combine(arguments: Conversion) -> None:
    options, paths = arguments.combined, arguments.paths
    adapters = [open_adapter(path) for path in (paths.input, *options.others)]
    _check_one_base(adapters)
    weights = options.weights or (1.0,) * len(adapters)
    if len(weights) != len(adapters):
        raise UserError(f"weights has {len(weights)} numbers for {len(adapters)} adapters", "give one for each")
    if options.svd_rank is not None and options.method != "svd":
        raise UserError(
            f"svd_rank has no effect with --method {options.method}", "leave it out, or choose --method svd"
        )
    if options.method == "linear" and min(weights) < 0:
        raise UserError("weights below 0 have no square root, as --method linear needs", "choose cat or svd")
    of_adapters = [_branches(adapter) for adapter in adapters]
    names = dict.fromkeys(name for branches in of_adapters for name in branches)
    made, lost, whole = {}, 0.0, 0.0
    for name in names:
        parts = [(b[name], w) for b, w in zip(of_adapters, weights, strict=True) if name in b]
        if len({(part.A.shape[1], part.sB.shape[0]) for part, _ in parts}) > 1:
            raise UserError(f"{name} has other sizes in another of the adapters", "combine adapters of one model")
        if options.method == "linear":
            if len({part.rank for part, _ in parts}) > 1:
                raise UserError(f"{name} has other ranks in another of the adapters", "choose --method cat or svd")
            made[name] = linear_sum([part for part, _ in parts], [weight for _, weight in parts])
            continue
        made[name] = side_by_side([part.times(weight) for part, weight in parts])
        if options.method == "svd":
            rank = min(options.svd_rank or parts[0][0].rank, *made[name].A.shape, made[name].sB.shape[0])
            made[name], gone, all_of_it = truncated(made[name], rank)
            lost, whole = lost + gone**2, whole + all_of_it**2
    if options.method == "svd":
        print(f"{arguments.command}: the relative error of the sum is {(lost / max(whole, 1e-300)) ** 0.5:.3g}")
    parameters = {name for adapter in adapters for name in adapter.lora_config.get("target_parameters") or ()}
    like = adapters[0].lora_config | {"target_parameters": sorted(parameters) or None}
    excluded = (a.lora_config.get("exclude_modules") for a in adapters if parameters)
    like["exclude_modules"] = next(filter(None, excluded), None)  # then experts may be without an adapter
    _write(arguments, _plain(made, like, adapters[0].where), *options.others)


def _extract(arguments: Conversion) -> None:
    if arguments.base.base is None:
        raise UserError("extract needs the model that the input was tuned from", "give --base")
    config, tuned = read_base(arguments.paths.input)
    base_config, base = read_base(arguments.base.base)
    if config.tensors != base_config.tensors:
        raise UserError(
            f"{arguments.paths.input} and {arguments.base.base} have other tensors or sizes", "name models of one shape"
        )
    made, lost, whole = {}, 0.0, 0.0
    for name, placed in config.linears.items():
        difference = _read(tuned, f"{name}.weight") - _read(base, f"{name}.weight")
        if placed.linear.transposed:
            difference = difference.t()
        if not difference.any():
            continue
        made[name], gone, all_of_it = nearest(difference, min(arguments.extracted.rank, *difference.shape))
        lost, whole = lost + gone**2, whole + all_of_it**2
    weights = {f"{name}.weight" for name in config.linears}
    apart = [n for n in config.tensors if n not in weights and not _same(tuned, base, n)]
    if not made:
        raise UserError(
            f"{arguments.paths.input}: its linears are those of {arguments.base.base}, so there is nothing to extract",
            "name a model that was tuned from --base",
        )
    print(f"{arguments.command}: relative error {(lost / whole) ** 0.5:.3g} over {len(made)} linears")
    if apart:
        what = f"{len(apart)} tensors that are no linears differ too and are not in the adapter: {apart[0]}, ..."
        print(f"megalora: {what}", file=sys.stderr)
    stacks = [name for name, linears in config.stacked_linears.items() if not made.keys().isdisjoint(linears)]
    like = {"base_model_name_or_path": str(arguments.base.base), "target_parameters": stacks or None}
    _write(arguments, _plain(made, like, arguments.paths.input), arguments.base.base)


def _same(one: BaseWeights, other: BaseWeights, name: str) -> bool:
    """Return whether a tensor is the same in both, or in neither (a head)."""
    if name not in one.shapes or name not in other.shapes:
        return name not in one.shapes and name not in other.shapes
    return torch.equal(_read(one, name), _read(other, name))


def _read(weights: BaseWeights, name: str) -> torch.Tensor:
    """Return a whole tensor in float32 (float64 where it is)."""
    out = torch.empty(weights.shapes[name], dtype=weights.dtype(name))
    weights.copy(name, tuple(slice(0, n) for n in out.shape), out)
    return out.to(torch.promote_types(out.dtype, torch.float32))


def _compare(arguments: Conversion) -> None:
    paths = arguments.compared
    ours, theirs = (_branches(open_adapter(path)) for path in (paths.adapter, paths.other))
    rows, total, size = [], 0.0, 0.0
    for name in sorted(ours.keys() | theirs.keys()):
        parts = [part for part in (ours.get(name), theirs.get(name) and theirs[name].times(-1.0)) if part is not None]
        if len({(part.A.shape[1], part.sB.shape[0]) for part in parts}) > 1:
            raise UserError(f"{name} has other sizes in {paths.other}", "compare adapters of one model")
        same = len(parts) == 2 and all(map(torch.equal, ours[name][:2], theirs[name][:2]))
        apart = 0.0 if same else norm(side_by_side(parts))  # which rounding would leave above 0
        own = norm(ours[name]) if name in ours else 0.0
        total, size = total + apart**2, size + own**2
        rows.append((apart / own if own else float("inf"), name, "" if len(parts) == 2 else " (in one of them only)"))
    for ratio, name, note in sorted(rows, reverse=True)[:10]:
        print(f"{ratio:10.3g}  {name}{note}")
    print(f"{(total / size) ** 0.5 if size else float('inf'):10.3g}  all {len(rows)} linears")
    print("(Frobenius norm of the difference of what they add to the weights, over that of the input)")


_STARTS: Mapping[str, Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]] = {
    "pissa": principal,
    "olora": orthonormal,
}


def _init(arguments: Conversion) -> None:
    paths = arguments.paths
    fields, where = lora_fields(arguments.started.lora_config)
    kind = fields.get("init_lora_weights")
    if kind not in _STARTS:
        raise UserError(f"{where}: init_lora_weights = {kind!r} is not valid", f"give {' or '.join(PREPARED)}")
    target = target_of(paths)
    config, weights = read_base(paths.input)
    lora = resolve_lora(LoraConfig.from_dict(fields | {"init_lora_weights": True}, where), config)
    if lora.config.use_dora or lora.config.lora_bias or not set(lora.adapters) <= set(config.linears):
        raise UserError(f"{where}: {kind} is of plain LoRA on linears", "leave the other fields out")
    tensors = dict(_started(config, lora, weights, _STARTS[kind]))
    negative = {name: replace(adapter, scaling=-adapter.scaling) for name, adapter in lora.adapters.items()}
    transposed = [name for name, placed in config.linears.items() if placed.linear.transposed]
    residual = as_in_files(MergedWeights(weights, negative, tensors, transposed), config)
    plan = plan_hf(tensor_types(residual, config.tensors), max_file_bytes(arguments))
    target.check_room(plan.nbytes)
    if paths.dry_run:
        print(f"{arguments.command}: {paths.output} would hold the changed base and {INITIAL}; nothing was written")
        return
    with target.writing() as folder:
        transfer(residual, plan, folder, lambda done: None)
        copy_companions(companions(paths.input), folder)
        write_peft(
            folder / INITIAL, tensors, lora.config.to_dict(), str(Path(paths.output).resolve()), config.expert_counts
        )
    start = f"--model_path {paths.output} --resume_peft_from_checkpoint {paths.output}/{INITIAL}"
    say_done(arguments, f"train with {start}")


def _started(
    config: ModelSpec,
    lora: ResolvedLora,
    weights: BaseWeights,
    start: Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, adapter in lora.adapters.items():
        W = _read(weights, f"{name}.weight")
        A, B = start(W.t() if config.linears[name].linear.transposed else W, adapter.r, adapter.scaling)
        yield f"{name}.lora_A.weight", A.contiguous()
        yield f"{name}.lora_B.weight", B.contiguous()


def _to_lora(arguments: Conversion) -> None:
    adapter, initial = open_adapter(arguments.paths.input), open_adapter(arguments.plain.initial)
    now, then = _branches(adapter), _branches(initial)
    if now.keys() != then.keys():
        raise UserError(
            f"adapter {adapter.where}: adapts other linears than {initial.where}", "name the initial adapter of its run"
        )
    made = {name: side_by_side([now[name], then[name].times(-1.0)]) for name in now}
    like = dict(adapter.lora_config) | {"base_model_name_or_path": arguments.base.base}
    _write(arguments, _plain(made, like, adapter.where), arguments.plain.initial)


RECOMBINE: Mapping[str, Callable[[Conversion], None]] = {
    "adapter combine": _combine,
    "adapter extract": _extract,
    "adapter compare": _compare,
    "adapter init": _init,
    "adapter to-lora": _to_lora,
}
