"""What model_path and resume_from_checkpoint name: a folder, a model of the Hugging Face hub, or something else.

No torch: this is asked before the seconds that importing it takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from megalora.errors import UserError

HUB = "hf://"
_MARKER = ".megalora.json"  # of the output_dir of a run
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a folder of the hub's cache
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_NOT_FETCHED = ("original/*", "onnx/*", "metal/*", "openvino/*", "consolidated*")


def model_folder(path: str) -> str:
    """Return the folder of a model. What the hub has under that name (OWNER/NAME, hf://OWNER/NAME@REVISION) is fetched.

    A name is looked for there only if there is no such folder, and none that its first part names. Raises UserError
    where the hub does not give it.
    """
    wanted = path.removeprefix(HUB)
    if not path.startswith(HUB) and (os.path.exists(path) or os.path.isdir(path.split("/")[0])):
        return path
    if not _HUB_ID.fullmatch(wanted):
        if path.startswith(HUB):
            raise UserError(f"model_path {path} is no model of the hub", "write it like hf://OWNER/NAME")
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"model_path {path} does not exist here, and fetching it needs the package huggingface_hub",
            "pip install huggingface_hub, or name a folder",
        ) from None
    name, _, revision = wanted.partition("@")
    try:
        return huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(_FETCHED), ignore_patterns=list(_NOT_FETCHED)
        )
    except Exception as error:  # of the hub's client, of the libraries below it, of the disk
        raise UserError(*_not_fetched(path, error)) from None


def _not_fetched(path: str, error: Exception) -> tuple[str, str]:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return (
            f"model_path {path}: the Hugging Face hub gives it only to those who have accepted its licence",
            f"accept it at huggingface.co/{path.removeprefix(HUB)} and log in with: hf auth login",
        )
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return (
            f"model_path {path}: is no folder here, and no model of the Hugging Face hub",
            "correct the name; a model that is not public needs: hf auth login",
        )
    return (
        f"model_path {path}: is no folder here, and cannot be fetched from the Hugging Face hub ({error})",
        "name a folder, or fetch it where there is a network: hf download OWNER/NAME --local-dir DIR",
    )


def public_name(path: str) -> str:
    """Return OWNER/NAME of a model that lies in the hub's cache, which means the same elsewhere; else the path."""
    parts = Path(path).absolute().parts
    found = [_CACHED.fullmatch(part) for part in parts]
    named = next(
        (match for match, after in zip(found, parts[1:], strict=False) if match and after == "snapshots"), None
    )
    return path if named is None else f"{named[1]}/{named[2]}"


def check_holds_base(path: str, flag: str) -> None:
    """Raise UserError where `path`, the value of `flag`, is something that is often taken for a folder of weights."""
    folder = Path(path)
    if folder.suffix.lower() == ".gguf" and folder.is_file():
        raise _gguf(flag, folder)
    if not folder.is_dir():
        return
    weights = any(folder.glob("*.safetensors")) and not (folder / "adapter_config.json").exists()
    if weights or any(folder.glob("mp_rank_*/partial_model_optim.pt")):
        return
    found = next(iter(sorted(folder.glob("*.gguf"))), None)
    if found is not None:
        raise _gguf(flag, found)
    what = _kind_of_adapter(folder)
    if what is None:
        return
    also = ", which goes with model_path" if flag == "model_path" else ""
    raise UserError(
        f"{flag} {path}: is {what}, and holds no base weights",
        f"give it as resume_peft_from_checkpoint{also and ', and the model it was trained on as model_path'}"
        f"{'' if also else ', and leave resume_from_checkpoint out'}",
    )


def check_writes_apart(flag: str, path: str | None, models: Iterable[str | None], *, file: bool = False) -> None:
    """Raise UserError where the value of `flag`, which is written to, is a folder of base weights.

    A folder in which a run is already is let through: it goes on there.

    models  folders (or files) that the command reads the model from; file: the value is a file, whose folder counts
    """
    if path is None or (not file and (Path(path) / _MARKER).exists()):
        return
    target = Path(path).resolve()
    folder, bases = target.parent if file else target, {Path(model).resolve() for model in models if model is not None}
    if target in bases:
        said = f"is {'what' if file else 'the folder that'} the model is read from"
    elif file and folder in bases and _is_base(folder):
        said = "lies in the folder that the model is read from"
    elif not file and _is_base(folder):
        said = "holds a model"
    else:
        return
    raise UserError(f"{flag} {path}: {said}", f"name another {'file' if file else 'folder'}")


def _is_base(folder: Path) -> bool:
    """Return whether a folder holds the weights of a model."""
    if (folder / "adapter_config.json").exists():
        return False
    weights = (file for ending in ("safetensors", "bin", "gguf") for file in folder.glob(f"*.{ending}"))
    in_shards = any(folder.glob("mp_rank_*/partial_model_optim.pt"))
    return in_shards or ((folder / "config.json").is_file() and any(True for _ in weights))


def check_no_adapter(folder: Path, flag: str) -> None:
    """Raise UserError if the value of `flag`, which a conversion of base weights reads, is an adapter."""
    what = None if (folder / "config.json").exists() else _kind_of_adapter(folder)
    if what is not None:
        raise UserError(
            f"{flag} {folder}: is {what}, and holds no base weights",
            "give it to megalora convert adapter to-peft, or to adapter merge, which adds it to its base",
        )


def _kind_of_adapter(folder: Path) -> str | None:
    """Return what a folder without base weights is, in words; None where it is nothing of an adapter."""
    if (folder / "adapter_config.json").exists():
        return "a PEFT adapter"
    if any(folder.glob("mp_rank_*/lora_partial_model_optim.pt")):
        return "a checkpoint of an adapter"
    return "the output_dir of a run" if (folder / _MARKER).exists() else None


def _gguf(flag: str, file: Path) -> UserError:
    return UserError(
        f"{flag} {file}: is a GGUF file, which is not read as it is",
        f"make a folder of it first: megalora convert from-gguf --input {file} --output DIR",
    )
