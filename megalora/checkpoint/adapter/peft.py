"""Adapters as the peft library keeps them: adapter_config.json and adapter_model.safetensors.

A key of PEFT is `base_model.model.` + our name, but for one kind: the trained bias of an adapted linear,
which peft has wrapped, is `q_proj.base_layer.bias` there. That of any other linear is `o_proj.bias`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from megalora.adapters.config import LoraConfig
from megalora.adapters.sharing import by_expert as shared_by_expert
from megalora.adapters.words import TOKENS
from megalora.checkpoint.adapter.alike import alike
from megalora.checkpoint.adapter.fused import by_expert, fused, is_fused
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.checkpoint.disk import unpickled
from megalora.checkpoint.manifest import MANIFEST, entry_of, verify, write_manifest
from megalora.errors import UserError
from megalora.files import check_regular, read_json, refuse_link, write_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
_EXPERT = re.compile(r"\.experts\.\d+\.")
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")
_OF_LINEARS = (*_FACTORS, ".lora_B.bias", ".lora_magnitude_vector", ".bias", *_EMBEDDING_FACTORS, f".{TOKENS}")
# What peft saves beside what is trained: the base's matrix of an adapted embedding, and a second copy of a whole one.
_COPIES = (".base_layer.weight", ".original_module.weight", ".modules_to_save.weight")
_FIRST_OF_HEAD = ("pooler", "pre_classifier")  # linears of heads that peft saves only where modules_to_save names them
_HEADS, _EMBEDDINGS = ("lm_head", "embed_out"), ("embed_tokens", "wte", "embed_in", "word_embeddings")


def read_peft(folder: str | Path) -> AdapterCheckpoint:
    """Return the adapter in a PEFT folder; tensors have the dtype of the file. Sums are checked where we wrote them.

    Raises UserError for a file that is missing or damaged, a field of the config that would change the
    numbers and is not supported, and a tensor that is no part of a LoRA on a linear.
    """
    folder, base_format = Path(folder), None
    if (folder / MANIFEST).exists():
        again = "export it again (megalora convert adapter to-peft --input RUN --output DIR)"
        remedy = f"{again}; if it was changed on purpose, remove {MANIFEST}"
        base_format = verify(folder, "adapter", remedy, lambda body: body.get("base_format"))
    config = folder / CONFIG_FILE
    fields = read_json(config)
    if not fields.get("use_qalora"):
        fields.pop("qalora_group_size", None)  # peft writes it always
    # peft saves true in every folder and, when it loads one, goes by its own argument instead.
    fields["inference_mode"] = False
    if not fields.get("target_modules") and fields.get("target_parameters"):
        fields["target_modules"] = None
    lora_config = LoraConfig.from_dict(fields, str(config), trained=True).to_dict()
    base = fields.get("base_model_name_or_path")
    if isinstance(base, str):
        lora_config["base_model_name_or_path"] = base
    file, raw = _read_tensors(folder)
    raw, copies = _without_copies(raw, fields)
    resized = {name for name in map(_end_of, raw) if name and name not in (fields.get("modules_to_save") or ())}
    if resized:  # what peft saves of a model whose vocabulary was resized: as if it were trained in full
        lora_config["modules_to_save"] = sorted({*(lora_config["modules_to_save"] or ()), *resized})
    modules = (*(fields.get("modules_to_save") or ()), *resized)
    saved = tuple(f"{PREFIX}{name}" for name in _saved_names(modules, raw))
    tensors = {_our_name(key, file, saved): tensor for key, tensor in raw.items()}
    tensors, lora_config = by_expert(tensors, lora_config, str(file))
    for name, tensor in tensors.items():
        _check_values(name, tensor, file)
    adapted = _adapted(tensors)
    for linear in sorted(adapted):
        factors = [tensors.get(linear + suffix) for suffix in _FACTORS]
        for suffix, factor in zip(_FACTORS, factors, strict=True):
            if factor is None:
                raise UserError(f"{file}: has no {PREFIX}{linear}{suffix}", "save the adapter again")
        a, b = factors
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise UserError(
                f"{file}: {PREFIX}{linear} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                "which are not [r, in] and [out, r]",
                "save the adapter again",
            )
    if not adapted and not tensors:
        raise UserError(f"{file}: holds no lora_A", "name the folder of a trained adapter")
    note = f"{file}: {', '.join(copies)}: copies, which are not read"
    notes, where = (note,) if copies else (), str(folder)
    return AdapterCheckpoint(lora_config, tensors, where=where, notes=notes, base_format=base_format)


def write_peft(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor],
    lora_config: Mapping[str, Any],
    base_model_name_or_path: str | None = None,
    experts: Mapping[str, int] | None = None,
    base_format: str | None = None,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` reads, and its sums; the tensors keep dtype and bits.

    tensors      whole tensors by our names
    lora_config  fields of LoraConfig.to_dict(), and the base_model_name_or_path of PEFT where it is known
    base_model_name_or_path  where another one is to be written
    experts      how many experts each parameter of several holds (ModelSpec.expert_counts); None: not known
    base_format  of the base that it was trained on, which is told where it is used on another; None: not known
    Raises UserError where the folder cannot be written, and as `fused`.
    """
    folder = Path(folder)
    tensors, lora_config = shared_by_expert(tensors, lora_config)
    adapted = _adapted(tensors)
    fields = dict(lora_config) | {
        "peft_type": "LORA",
        "base_model_name_or_path": _absolute(base_model_name_or_path or lora_config.get("base_model_name_or_path")),
        "inference_mode": True,
    }
    trained = [part for part in _FIRST_OF_HEAD if any(name.startswith(f"{part}.") for name in tensors)]
    if trained:
        fields["modules_to_save"] = list(dict.fromkeys([*(fields.get("modules_to_save") or ()), *trained]))
    embeddings = {name.removesuffix(".lora_embedding_A") for name in tensors if name.endswith(".lora_embedding_A")}
    tensors, fields = alike(*fused(tensors, fields, experts), experts)
    modules = {name for name in _adapted(tensors) if not is_fused(fields, name.removesuffix(".base_layer"))}
    fields |= _explicit_targets(fields, modules | embeddings)
    if any(_EXPERT.search(name) for name in adapted):  # peft refuses dropout there, even to use the adapter
        short = {name.rpartition(".")[2] for name in modules}
        if fields.get("exclude_modules"):  # those of experts are there, as zeros
            short = {name.rpartition(".")[2] if _EXPERT.search(name) else name for name in modules}
        fields |= {"target_modules": sorted(short), "lora_dropout": 0.0, "exclude_modules": None}
    adapted = modules
    keys = {_peft_key(name, adapted): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # until the new one: the files of two exports may lie side by side
        write_file(folder / WEIGHTS_FILE, save(keys, metadata={"format": "pt"}))
        write_file(folder / CONFIG_FILE, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())
        told = {} if base_format is None else {"base_format": base_format}
        write_manifest(folder, {name: entry_of(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)}, **told)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror})", "free space, or name another folder"
        ) from None


_NO_OUT_PROJ = ("falcon_h1", "nemotron_h")  # whose kernels of Mamba-2 read the weight itself


def peft_caution(
    model_type: str, adapted: Collection[str], routers: Collection[str], stacked: Collection[str] = ()
) -> str | None:
    """Return a line on what peft makes of an adapter of experts, or of Mamba-2, where that is not what was trained.

    adapted  names of the adapted linears; routers: of the model's routers; stacked: of linears that are in
             one tensor for all experts, whose adapters peft takes as they are. As found with peft 0.21, transformers 5.
    """
    refused = min((n for n in adapted if n.endswith(".out_proj")), default=None) if model_type in _NO_OUT_PROJ else None
    if refused is None and not any(_EXPERT.search(name) for name in adapted) and not set(routers) & set(adapted):
        return None
    beside = [n for n in adapted if n.endswith(("gate_proj", "up_proj", "down_proj")) and not _EXPERT.search(n)]
    if set(routers) & set(adapted):
        problem = "peft has no adapters of routers"
    elif refused is not None:
        problem = f"peft 0.21 refuses adapters of out_proj ({refused}) for {model_type}"
    elif model_type in ("qwen2_moe", "lfm2_moe", "nemotron_h", "phimoe"):
        problem = f"peft 0.21 does not load adapters of experts for {model_type}, and does not say so"
    elif beside and any(".mlp.experts." in name for name in {*adapted}.difference(stacked)):
        problem = f"peft 0.21 mixes up adapters of experts and of other MLPs ({min(beside)}) for {model_type}"
    else:
        return None
    return f"{problem}: to use this adapter with transformers, put it into the weights (convert adapter merge)"


def dropout_caution(lora_config: Mapping[str, Any], adapted: Collection[str]) -> str | None:
    """Return a line where `write_peft` writes another lora_dropout than the adapter was trained with."""
    if not lora_config.get("lora_dropout") or not any(_EXPERT.search(name) for name in adapted):
        return None
    return (
        f"adapter_config.json says lora_dropout 0 instead of {lora_config['lora_dropout']:g}: peft refuses dropout of "
        "experts, even to use the adapter; to train it further with dropout, start from the run itself or give "
        "--lora_config"
    )


def _absolute(base: str | None) -> str | None:
    """Return the absolute path of a folder, which is read from elsewhere; any other name as it is."""
    return str(Path(base).resolve()) if base is not None and Path(base).is_dir() else base


def _explicit_targets(fields: Mapping[str, Any], adapted: set[str]) -> dict[str, Any]:
    """Return the targets as peft takes them: it has other defaults, and refuses layers beside a pattern.

    A classifier's are full names: of "all-linear" and "dense" peft takes its head too, and then refuses to train that.
    """
    if fields.get("modules_to_save"):
        return {"target_modules": sorted(adapted), "layers_to_transform": None}
    if isinstance(fields.get("target_modules"), str) and fields.get("layers_to_transform") is not None:
        return {"target_modules": sorted(adapted), "layers_to_transform": None}
    experts = any(_EXPERT.search(name) for name in adapted)
    if fields.get("target_modules") is None or (fields["target_modules"] == "all-linear" and not experts):
        # Engines read names.
        return {"target_modules": sorted({name.rpartition(".")[2] for name in adapted})}
    return {}


def _adapted(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Return names of the linears that have a factor among the tensors."""
    return {name.removesuffix(suffix) for name in tensors for suffix in _FACTORS if name.endswith(suffix)}


def _peft_key(name: str, adapted: set[str]) -> str:
    linear = name.removesuffix(".bias")
    return PREFIX + (f"{linear}.base_layer.bias" if name.endswith(".bias") and linear in adapted else name)


def _without_copies(
    raw: Mapping[str, torch.Tensor], fields: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors without what is there twice, or is the base's own; and the names of those left out."""
    copies = {key for key in raw if key.endswith(_COPIES[:2])}
    copies |= {key for key in raw if key.endswith(_COPIES[2]) and key.replace(".modules_to_save", "") in raw}
    rows = [key for key in raw if key.endswith(f".{TOKENS}")]
    if isinstance(fields.get("trainable_token_indices"), list) and len(rows) == 2 and torch.equal(*map(raw.get, rows)):
        copies |= {key for key in rows if _module_of(key, f".{TOKENS}") in _HEADS}  # tied: the embedding's
    return {key: tensor for key, tensor in raw.items() if key not in copies}, sorted(copies)


def _module_of(key: str, leaf: str) -> str:
    return key.removesuffix(leaf).rpartition(".")[2]


def _check_values(name: str, tensor: torch.Tensor, file: Path) -> None:
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{file}: {PREFIX}{name} is of {kind}, not of a floating-point dtype", "save the adapter again")
    if not tensor.to(torch.promote_types(tensor.dtype, torch.float32)).isfinite().all():
        said = f"{file}: {PREFIX}{name} holds numbers that are not finite"
        raise UserError(said, "take another checkpoint of its run")


def _end_of(key: str) -> str | None:
    """Return the module, where a tensor is the whole matrix of an embedding or a head."""
    name = _module_of(key, ".weight")
    return name if key.endswith(".weight") and name in (*_HEADS, *_EMBEDDINGS) else None


def _saved_names(modules: Collection[str], raw: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names in the file of the tensors of modules that are trained in full, and of modules in these."""
    names = (key.removeprefix(PREFIX) for key in raw)
    return {n for n in names if ".lora_" not in n and any(f".{module}." in f".{n}" for module in modules)}


def _our_name(key: str, file: Path, saved: Collection[str] = ()) -> str:
    """Return our name of a key of PEFT's. saved: keys of modules that are trained in full."""
    if key in saved:
        return key.removeprefix(PREFIX)
    name = key.removeprefix(PREFIX).replace(".base_layer.bias", ".bias")
    name = name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")  # as early versions of peft wrote it
    if not key.startswith(PREFIX) or not name.endswith(_OF_LINEARS):
        raise UserError(f"{file}: {key} is no known part of a LoRA on a linear", "use an adapter of linears only")
    return name


def _read_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    file = folder / WEIGHTS_FILE
    if file.exists():
        check_regular(file)
        try:
            return file, load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{file}: is damaged or not safetensors ({error})", "copy or download it again") from None
    file = folder / PICKLE_FILE
    if not file.exists():
        raise UserError(f"{folder}: holds neither {WEIGHTS_FILE} nor {PICKLE_FILE}", "name a PEFT folder")
    state = unpickled(file)
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise UserError(f"{file}: is not a dict of tensors by name", "save the adapter again")
    return file, state
