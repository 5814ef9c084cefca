"""Conversions, top to bottom: what is read, what will be written, the checks, the writing.

    python tools/convert_hf.py to-shards --input HF_FOLDER --output SHARDS --tensor_parallel_size 2
    python tools/convert_hf.py to-hf --input SHARDS --output HF_FOLDER

In one process, on the CPU; base weights pass through in blocks, so that memory does not grow with the model.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megalora.adapters.config import LoraConfig, ResolvedLora
from megalora.building import base_names, check_adapter, resolve_lora, settle_head, stage_layers
from megalora.card import CARD, merged_card, read_card, write_card
from megalora.checkpoint.adapter.engines import engines_caution
from megalora.checkpoint.adapter.fused import apart
from megalora.checkpoint.adapter.merge import MergedWeights
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.peft import dropout_caution, peft_caution, write_peft
from megalora.checkpoint.adapter.shards import AdapterCheckpoint, save_adapter
from megalora.checkpoint.base.gguf import read_gguf, write_hf
from megalora.checkpoint.base.hf import AsStored, is_hf
from megalora.checkpoint.base.quantised import holds_quantised
from megalora.checkpoint.base.source import BaseWeights
from megalora.checkpoint.base.stacked import Stacked
from megalora.checkpoint.base.transfer import TransferPlan, plan_hf, plan_shards, tensor_types, transfer
from megalora.checkpoint.base.weights import open_base, with_own_head
from megalora.checkpoint.layout import Layout, has_shards
from megalora.checkpoint.run.folder import export_folder, tokenizer_folder
from megalora.checkpoint.target import TargetFolder, companions
from megalora.data.classes import write_labels
from megalora.data.tokenizer import OpenedTokenizer, open_tokenizer
from megalora.errors import UserError
from megalora.files import write_file
from megalora.flags import Conversion, ConvertArguments, LayoutArguments
from megalora.identity import adapter_labels, adapter_template, base_format_of, base_identity, check_base
from megalora.model_paths import check_no_adapter, model_folder, public_name
from megalora.models.config import check_layout, check_task, read_config
from megalora.models.spec import ClassHead, Head, ModelSpec
from megalora.models.stage import NO_LORA, Stage
from megalora.monitor.progress import ByteProgress
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import Split, named_splits
from megalora.tokenizer_files import has_tokenizer, read_template, write_template
from megalora.vocabulary import adapter_tokens, with_rows_for


def convert(arguments: Conversion) -> None:
    """Run one conversion. Raises UserError for what the user can fix; what was at the output is then untouched."""
    _COMMANDS[arguments.command](arguments)


# ---- base weights ----


def _to_shards(arguments: Conversion) -> None:
    target = target_of(arguments.paths)
    config, weights = read_base(arguments.paths.input)
    _refuse_quantised(arguments.paths.input)
    tensors = tensor_types(weights, config.tensors)
    plan = plan_shards(tensors, _places(config, arguments.layout))
    write_base(arguments, target, weights, plan, arguments.paths.input)


def _to_hf(arguments: Conversion) -> None:
    target = target_of(arguments.paths)
    config, weights = read_base(arguments.paths.input)
    if holds_quantised(arguments.paths.input):  # with the scales, and named as they are
        weights = AsStored(arguments.paths.input)
    else:
        weights = as_in_files(weights, config)
    plan = plan_hf(tensor_types(weights, config.tensors), max_file_bytes(arguments))
    write_base(arguments, target, weights, plan, arguments.paths.input)


def _dequantise(arguments: Conversion) -> None:
    target = target_of(arguments.paths)
    config, weights = read_base(arguments.paths.input)
    if not holds_quantised(arguments.paths.input):
        raise UserError(f"input {arguments.paths.input}: is not quantised", "use it as it is")
    weights = as_in_files(weights, config)
    plan = plan_hf(tensor_types(weights, config.tensors), max_file_bytes(arguments))
    write_base(arguments, target, weights, plan, arguments.paths.input)


def _reshard(arguments: Conversion) -> None:
    folder = Path(arguments.paths.input)
    if is_hf(folder) or not has_shards(folder):
        raise UserError(f"input {folder}: is no folder of shards, which reshard reads", "for safetensors use to-shards")
    _to_shards(arguments)


def _from_gguf(arguments: Conversion) -> None:
    target = target_of(arguments.paths)
    gguf = read_gguf(arguments.paths.input)
    nbytes = gguf.numel * torch.float32.itemsize
    what = f"{gguf.tensors} tensors, {len(gguf.tokens)} tokens, {nbytes / 1e9:.2f} GB"
    target.check_room(nbytes)
    if arguments.paths.dry_run:
        print(f"{arguments.command}: {arguments.paths.output} would hold {what}; nothing was written")
        return
    with target.writing() as folder:
        write_hf(gguf, folder)
    say_done(arguments, what)


def read_base(folder: str) -> tuple[ModelSpec, BaseWeights]:
    """Return the model in a folder of safetensors or shards, checked to be whole."""
    check_no_adapter(Path(folder), "input")
    config = _read_model(folder)
    return config, open_base(folder, base_names(config))


def as_in_files(weights: BaseWeights, config: ModelSpec) -> BaseWeights:
    """Return `weights` by our names as those of the model's safetensors: with one tensor for all experts, where so."""
    return Stacked(weights, config.stacks) if config.stacks else weights


def _refuse_quantised(folder: str) -> None:
    """Raise UserError where weights are quantised: shards hold floating-point numbers only."""
    if holds_quantised(folder):
        raise UserError(
            f"input {folder}: is quantised, and shards hold floating-point numbers only",
            "write it in 16 bits first (megalora convert dequantise)",
        )


def _read_model(folder: str) -> ModelSpec:
    """Return the model's spec, with the head that its weights have; a line says where that is another than
    config.json's.
    """
    config, note = settle_head(read_config(folder), folder)
    _say(note)
    return config


def _say(note: str | None) -> None:
    if note is not None:
        print(f"megalora: {note}", file=sys.stderr, flush=True)


def max_file_bytes(arguments: Conversion) -> int:
    return int(arguments.safetensors.max_shard_size * 1e9)


def write_base(
    arguments: Conversion,
    target: TargetFolder,
    weights: BaseWeights,
    plan: TransferPlan,
    model: str,
    chat_template: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write the planned weights and the model folder's other files, with `chat_template` if given.

    finish  is called with the folder, to change the copies
    """
    beside = companions(model)
    nbytes = plan.nbytes + sum(file.stat().st_size for file in beside.values())
    target.check_room(nbytes)
    if arguments.paths.dry_run:
        _say_plan(arguments, target, plan, beside, nbytes)
        return
    began = time.monotonic()
    with target.writing() as folder:
        with ByteProgress(sum(file.nbytes for file in plan.files), arguments.command) as progress:
            transfer(weights, plan, folder, progress.advance)
        copy_companions(beside, folder)
        if finish is not None:
            finish(folder)
        if not isinstance(weights, AsStored):
            _forget_quantisation(folder)
        if chat_template is not None and chat_template != read_template(folder):
            write_template(folder, chat_template)
            what = f"{arguments.paths.output} has the chat template that the adapter was trained with"
            print(f"megalora: {what}, not the one of {model}", file=sys.stderr, flush=True)
    files = len(plan.files) + len(plan.texts) + len(beside)
    say_done(arguments, f"{files} files, {nbytes / 1e9:.2f} GB, {time.monotonic() - began:.1f} s")


def _forget_quantisation(folder: Path) -> None:
    """Take out of a copied config.json that the weights are quantised, where they no longer are."""
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    if any([fields.pop(name, None) is not None for name in ("quantization_config", "compression_config")]):
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def copy_companions(beside: Mapping[str, Path], folder: Path) -> None:
    """Copy what lies beside a model's weights (of `companions`) into a folder."""
    for name, file in beside.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


# ---- adapters: a run, shards or a PEFT folder, whole in memory ----


def _adapter_to_peft(arguments: Conversion) -> None:
    adapter = open_adapter(arguments.paths.input)
    target = target_beside(adapter, arguments)
    lora_config = LoraConfig.from_dict(adapter.lora_config, adapter.where)
    modules = {name.partition(".lora_")[0] for name in adapter.tensors if ".lora_" in name}
    _say(dropout_caution(adapter.lora_config, modules))
    if lora_config.task_type == "CAUSAL_LM":
        _say(engines_caution(lora_config.to_dict(), modules))
    config = config_of(adapter, arguments)
    if config is not None:
        linears = [name.removesuffix(".lora_A.weight") for name in adapter.tensors if name.endswith(".lora_A.weight")]
        _say(peft_caution(config.model_type, linears, config.routers, config.in_stacks))

    def write(folder: Path) -> None:
        experts = None if config is None else config.expert_counts
        write_peft(folder, adapter.tensors, adapter.lora_config, arguments.base.base, experts, base_format_of(adapter))
        write_its_tokenizer(adapter, arguments, folder)
        card = _card_of(adapter)
        if card is not None:
            write_card(folder, card)

    write_adapter(arguments, target, adapter, write)


def _card_of(adapter: AdapterCheckpoint) -> str | None:
    """Return the model card of an adapter, where it is in a PEFT folder of ours or its run has exported one."""
    where = Path(adapter.where)
    return read_card(where) or read_card(export_folder(where.parent.parent))


def config_of(adapter: AdapterCheckpoint, arguments: Conversion) -> ModelSpec | None:
    """Return the model of an adapter, where its folder is there."""
    base = arguments.base.base or adapter.lora_config.get("base_model_name_or_path")
    return read_config(base) if base is not None and (Path(base) / "config.json").is_file() else None


def write_its_tokenizer(adapter: AdapterCheckpoint, arguments: Conversion, folder: Path) -> None:
    """Write the tokenizer of the run, or else of the model, and the chat template that the adapter was trained with."""
    where, template = Path(adapter.where), adapter_template(adapter)
    base = arguments.base.base or adapter.lora_config.get("base_model_name_or_path")
    places = [tokenizer_folder(where.parent.parent), where, *([Path(base)] if base else [])]
    source = next((place for place in places if has_tokenizer(place)), None)
    labels = adapter_labels(adapter)
    config = next((place for place in places if (place / "config.json").is_file()), None)
    if labels and config is not None:
        write_labels(config, folder, labels)
    added = adapter_tokens(adapter, base) if base and source == Path(base) else ()
    if source is not None:
        (open_tokenizer(source, added) if added else OpenedTokenizer(None, source)).write(folder, template)
    elif template is not None:
        write_template(folder, template)


def _adapter_from_peft(arguments: Conversion) -> None:
    adapter = open_adapter(arguments.paths.input)
    target = target_beside(adapter, arguments)
    adapter, config, lora = _its_base(adapter, arguments)
    places = _places(config, arguments.layout, lora)

    def write(folder: Path) -> None:
        for at, splits in places.items():
            here = {name: splits[name].slice(tensor) for name, tensor in adapter.tensors.items() if name in splits}
            save_adapter(folder, here, splits, at, adapter.lora_config)
        write_its_tokenizer(adapter, arguments, folder)

    write_adapter(arguments, target, adapter, write)


def _adapter_merge(arguments: Conversion) -> None:
    adapter = open_adapter(arguments.paths.input)
    base = _base_of(adapter, arguments)
    target = target_of(arguments.paths, base)
    adapter, config, lora = _its_base(adapter, arguments)
    if not config.labels:
        config, note = settle_head(config, base)
        _say(note)
    weights = open_base(base, base_names(config))
    added = adapter_tokens(adapter, base)
    if adapter.trainer is not None:  # it says what it was trained on
        check_base(adapter, base_identity(config, base, open_tokenizer(base, added).tokenizer))
    transposed = [name for name, placed in config.linears.items() if placed.linear.transposed]
    untied = _adapts_one_end(config, lora)
    if untied and isinstance(config.head, Head):
        weights = with_own_head(weights, base_names(config))
        config = replace(config, head=replace(config.head, tied=False))
        _say(f"embedding and head are two matrices in {arguments.paths.output}: the adapter trains them apart")
    own = config.head.trained if isinstance(config.head, ClassHead) else ()
    merged = as_in_files(MergedWeights(weights, lora.adapters, adapter.tensors, transposed, lora.tokens, own), config)
    plan = plan_hf(tensor_types(merged, config.tensors), max_file_bytes(arguments))

    def finish(folder: Path) -> None:
        if config.labels:
            write_labels(base, folder, config.labels)
        if added:
            open_tokenizer(base, added).write(folder)
        if config.stored_words is not None or untied:
            _write_ends(folder, config)
        # The base's own card, if it was copied along, does not tell of this model.
        card = merged_card(public_name(str(base)), lora.config.task_type, _card_of(adapter))
        write_file(folder / CARD, card.encode())

    write_base(arguments, target, merged, plan, base, adapter_template(adapter), finish)


def _write_ends(folder: Path, config: ModelSpec) -> None:
    """Put the number of words, and whether the head is tied, into a copied config.json.

    Raises UserError where that does not take effect.
    """
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    text = fields if "vocab_size" in fields else fields.get("text_config", fields)  # of a larger model
    names = [name for name in ("vocab_size", "padded_vocab_size") if name in text] or ["vocab_size"]
    text |= dict.fromkeys(names, config.vocab_size)
    if isinstance(config.head, Head):
        fields["tie_word_embeddings"] = config.head.tied
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    found = read_config(file)
    if found.vocab_size != config.vocab_size or (isinstance(found.head, Head) and found.head.tied != config.head.tied):
        raise UserError(
            f"{config.model_type} cannot be written with {config.vocab_size} words and the head apart",
            "use the adapter as it is",
        )


def _adapts_one_end(config: ModelSpec, lora: ResolvedLora) -> bool:
    """Return whether embedding and head are one matrix in the base, and two with the adapter in it."""
    if not isinstance(config.head, Head) or not config.head.tied:
        return False
    ends = config.embedding.name, config.head.name
    return any(name in lora.saved or name in lora.adapters for name in ends) or config.head.name in lora.tokens


def _base_of(adapter: AdapterCheckpoint, arguments: Conversion) -> str:
    """Return the folder of the model that an adapter belongs to."""
    if arguments.base.base is not None:
        return arguments.base.base
    named = adapter.lora_config.get("base_model_name_or_path")
    if named is None:
        raise UserError(f"adapter {adapter.where}: does not name its base model", "give --base")
    try:
        folder = model_folder(named)
    except UserError:  # none of the hub's either
        folder = named
    if not Path(folder).is_dir():
        raise UserError(f"adapter {adapter.where}: is of {named}, which is no folder here", "give --base")
    return folder


def _its_base(adapter: AdapterCheckpoint, arguments: Conversion) -> tuple[AdapterCheckpoint, ModelSpec, ResolvedLora]:
    """Return an adapter by the model's names, the model and what is adapted, checked to belong together."""
    base = _base_of(adapter, arguments)
    config = read_config(base)
    adapter = apart(adapter, config.fused_experts)
    lora_config = LoraConfig.from_dict(adapter.lora_config, adapter.where, trained=True)
    check_task(lora_config.task_type, config, f"adapter {adapter.where}")
    config = config.for_task(lora_config.task_type, adapter_labels(adapter))
    config = with_rows_for(config, adapter_tokens(adapter, base), base, adapter.tensors)
    lora = resolve_lora(lora_config, config)
    check_adapter(adapter.tensors, lora, config, adapter.where)
    return adapter, config, lora


def write_adapter(
    arguments: Conversion, target: TargetFolder, adapter: AdapterCheckpoint, write: Callable[[Path], None]
) -> None:
    for note in adapter.notes:
        print(f"megalora: {note}", file=sys.stderr, flush=True)
    nbytes = sum(tensor.nbytes for tensor in adapter.tensors.values())
    what = f"{len(adapter.tensors)} tensors of {adapter.where}, {nbytes / 1e6:.2f} MB"
    layout = arguments.layout
    target.check_room(nbytes * layout.tensor_parallel_size)  # what every rank holds whole is written by each
    if arguments.paths.dry_run:
        print(f"{arguments.command}: {arguments.paths.output} would hold {what}; nothing was written")
        return
    with target.writing() as folder:
        write(folder)
    say_done(arguments, what)


# ---- layouts ----


def _places(config: ModelSpec, layout: LayoutArguments, lora: ResolvedLora = NO_LORA) -> dict[Layout, dict[str, Split]]:
    """Return what of each parameter lies on each rank. Raises UserError where the model cannot be cut so."""
    tp, pp = layout.tensor_parallel_size, layout.pipeline_parallel_size
    check_layout(config, tp, pp, layout.uneven_heads)
    layers = stage_layers(config, pp, layout.partition_method, layout.custom_partition)
    places = {}
    for at in (Layout(tp, pp, tp_rank, pp_rank) for pp_rank in range(pp) for tp_rank in range(tp)):
        place = Placement(Axis(at.tp_rank, tuple(range(tp))), False, torch.float32, "meta")
        stage = Stage(config, layers[at.pp_rank], place, lora, first=at.pp_rank == 0, last=at.pp_rank == pp - 1)
        places[at] = named_splits(stage)
    return places


# ---- what is checked and said ----


def target_of(paths: ConvertArguments, *more: str) -> TargetFolder:
    return TargetFolder(paths.output, paths.overwrite, [paths.input, *more])


def target_beside(adapter: AdapterCheckpoint, arguments: Conversion, *more: str) -> TargetFolder:
    """Return where an adapter goes, which may not be the folder of its model."""
    base = arguments.base.base or adapter.lora_config.get("base_model_name_or_path")
    return target_of(arguments.paths, *more, *([base] if base is not None else []))


def _say_plan(
    arguments: Conversion, target: TargetFolder, plan: TransferPlan, beside: Mapping[str, Path], nbytes: int
) -> None:
    width = max(len(file.path) for file in plan.files)
    print(f"{arguments.command}: {arguments.paths.input} -> {arguments.paths.output}, which would hold")
    for file in plan.files:
        print(f"  {file.path:{width}}  {len(file.table):5} tensors  {file.nbytes / 1e9:9.3f} GB")
    print(f"  and {', '.join(dict.fromkeys(Path(name).name for name in (*plan.texts, *beside)))}")
    files = len(plan.files) + len(plan.texts) + len(beside)
    print(
        f"{len(plan.tensors)} tensors, {files} files, {nbytes / 1e9:.3f} GB "
        f"({target.free_bytes / 1e9:.1f} GB are free); nothing was written"
    )


def say_done(arguments: Conversion, what: str) -> None:
    print(f"{arguments.command}: {arguments.paths.output} is written ({what})", flush=True)


_COMMANDS = {
    "to-shards": _to_shards,
    "to-hf": _to_hf,
    "reshard": _reshard,
    "dequantise": _dequantise,
    "from-gguf": _from_gguf,
    "adapter to-peft": _adapter_to_peft,
    "adapter from-peft": _adapter_from_peft,
    "adapter merge": _adapter_merge,
}
