"""What makes a run this run: the values that its checkpoints carry, and that decide whether one may be gone on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.adapters.config import LoraConfig
from megalora.building import base_names
from megalora.checkpoint.adapter.fused import apart
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.checkpoint.base.weights import model_fingerprint
from megalora.checkpoint.run.state import identity_difference
from megalora.data import ChatTemplate, PackedRows, Rendering
from megalora.data.classes import labels_of
from megalora.data.template_choice import with_fixed_date
from megalora.data.tokenizer import tokenizer_identity
from megalora.errors import UserError
from megalora.files import read_json
from megalora.model_paths import public_name
from megalora.models.config import read_config
from megalora.models.spec import ModelSpec
from megalora.tokenizer_files import read_template

_LATER = ("exclude_modules", "use_dora", "lora_bias", "target_parameters")
_NOT_OF_A_RUN = ("peft_type", "task_type", "inference_mode", "fan_in_fan_out")
_OF_THE_BASE = ("model", "tokenizer")
_BASE_FORMAT = "base format"


def base_identity(config: ModelSpec, weights: str, tokenizer: Any) -> dict[str, str]:
    """Return what an adapter is trained for: the base weights (their names, shapes and a sample of values), the
    tokenizer.

    Each value says in words what it can, and ends in a hash. Raises UserError as `open_base`. For one rank: it reads.
    """
    digest = model_fingerprint(weights, base_names(config))
    layers = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    return {"model": f"{config.model_type}, {layers}, {digest[:16]}", "tokenizer": tokenizer_identity(tokenizer)}


def adapter_for(path: str | Path, model_path: str | Path) -> AdapterCheckpoint:
    """Return the adapter in `path` by the names of the linears of the model in `model_path`. Raises UserError."""
    adapter = open_adapter(path)
    if not adapter.lora_config.get("target_parameters"):
        return adapter
    return apart(adapter, read_config(model_path).fused_experts)


def run_identity(
    base: Mapping[str, str],
    base_format: str,
    lora_config: LoraConfig,
    template: Rendering,
    rows: PackedRows,
    rows_of_a_step: int,
    seed: int,
    base_dropout: str | None = None,
) -> dict[str, str]:
    """Return what must not change between the parts of one run; the layout may. base: of `base_identity`.

    base_dropout  the dropouts of the base in words; None where its config asks for none
    """
    return {
        **base,
        _BASE_FORMAT: base_format,
        "chat template": template.identity(),
        "data": rows.fingerprint[:16],
        "rows of a step": str(rows_of_a_step),
        "seed": str(seed),
        **({} if base_dropout is None else {"base dropout": base_dropout}),
        **{
            f"lora_config.{name}": str(value)
            for name, value in lora_config.to_dict().items()
            if name not in _NOT_OF_A_RUN and not _is_silent(name, value)
        },
    }


def _is_silent(name: str, value: Any) -> bool:
    """Return whether it is a field that runs of earlier versions lack, with the value that they had."""
    return name in _LATER and value == getattr(LoraConfig, name)


@dataclass(frozen=True)
class Progress:
    """How far the run that saved a checkpoint was, and which run it is."""

    step: int
    identity: Mapping[str, str]


def progress(checkpoint: AdapterCheckpoint) -> Progress | None:
    """Return how far its run has come; None where the adapter is of no run (PEFT). Raises UserError where a run's
    numbers are not there.
    """
    if checkpoint.trainer is None:
        return None
    step, identity = checkpoint.trainer.get("step"), checkpoint.trainer.get("identity")
    if not isinstance(step, int) or not isinstance(identity, dict):
        raise UserError(f"checkpoint {checkpoint.where}: does not say its step and its run", "take another one")
    # A checkpoint that says nothing of the base's format is of a time when all were dense.
    return Progress(step, {_BASE_FORMAT: "dense", **{str(name): str(value) for name, value in identity.items()}})


def adapter_template(checkpoint: AdapterCheckpoint) -> str | None:
    """Return the chat template that an adapter was trained with, if it says so: a run's checkpoint or a PEFT folder."""
    recorded = (checkpoint.trainer or {}).get("chat_template")
    if isinstance(recorded, str):
        return recorded
    return read_template(checkpoint.where) if Path(checkpoint.where).is_dir() else None


def adapter_prefix(checkpoint: AdapterCheckpoint) -> str | None:
    """Return the source_prefix that an encoder-decoder's adapter was trained with, if it says so: a checkpoint."""
    recorded = (checkpoint.trainer or {}).get("source_prefix")
    return recorded if isinstance(recorded, str) else None


def adapter_labels(checkpoint: AdapterCheckpoint) -> tuple[str, ...]:
    """Return the labels that a classifier's adapter was trained with, where it says so: a checkpoint or a PEFT folder.

    Raises UserError where its config.json cannot be read.
    """
    recorded = (checkpoint.trainer or {}).get("labels")
    if isinstance(recorded, list):
        return tuple(map(str, recorded))
    file = Path(checkpoint.where) / "config.json"
    return labels_of(read_json(file), str(file), defaults=True) if file.is_file() else ()


def other_template(checkpoint: AdapterCheckpoint, template: Rendering) -> list[str]:
    """Return a line where an adapter that training starts from was trained with another chat template."""
    recorded = adapter_template(checkpoint)
    if recorded is None or not isinstance(template, ChatTemplate) or with_fixed_date(recorded) == template.source:
        return []
    return [f"the adapter {checkpoint.where} was trained with another chat template than {template.description}"]


def base_format_of(checkpoint: AdapterCheckpoint) -> str | None:
    """Return the format of the base that an adapter was trained on, where it is known."""
    theirs = progress(checkpoint)
    return checkpoint.base_format if theirs is None else theirs.identity[_BASE_FORMAT]


def other_base(checkpoint: AdapterCheckpoint, base_format: str, model_path: str) -> list[str]:
    """Return a line where an adapter was trained on the base in another format than `base_format`, and one where a PEFT
    folder names another model than `model_path`."""
    recorded, notes = base_format_of(checkpoint), []
    if recorded not in (None, base_format):
        said = f"was trained on the base in {recorded}, and is used on it in {base_format}"
        notes.append(f"the adapter {checkpoint.where} {said}")
    named = checkpoint.lora_config.get("base_model_name_or_path")
    if checkpoint.trainer is None and isinstance(named, str) and _short(named) != _short(model_path):
        said = f"was trained on {named} by its config, and is used on {model_path}"
        notes.append(f"the adapter {checkpoint.where} {said}")
    return notes


def _short(model: str) -> str:
    """Return the last part of a model's name, which a folder that was moved keeps."""
    return Path(public_name(str(Path(model).resolve()))).name.lower()


def check_base(checkpoint: AdapterCheckpoint, base: Mapping[str, str]) -> None:
    """Raise UserError where an adapter was trained on another base model or tokenizer, with the difference.

    base  as of `base_identity`; more fields do not matter
    """
    theirs = progress(checkpoint)
    if theirs is None:
        return
    ours = {name: base[name] for name in _OF_THE_BASE}
    difference = identity_difference({name: theirs.identity.get(name, "(none)") for name in _OF_THE_BASE}, ours)
    if difference:
        shapes = [str(one.get("model")).rpartition(",")[0] for one in (theirs.identity, ours)]
        anyway = "; or, to use the adapter on this one all the same, the run's peft folder"
        raise UserError(
            f"adapter {checkpoint.where}: was trained on another base ({difference})",
            f"name that model{anyway if shapes[0] == shapes[1] else ''}",
        )
