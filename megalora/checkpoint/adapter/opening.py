"""An adapter from wherever it lies: a run, one of its checkpoints, shards, a PEFT folder, or what Merak wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megalora.adapters.sharing import by_expert
from megalora.checkpoint.adapter import peft
from megalora.checkpoint.adapter.merak import read_reference, reference_folder
from megalora.checkpoint.adapter.shards import AdapterCheckpoint, read_adapter
from megalora.checkpoint.layout import has_shards
from megalora.checkpoint.manifest import MANIFEST
from megalora.checkpoint.run.folder import export_folder
from megalora.checkpoint.run.state import is_iteration, result_of, verified
from megalora.errors import UserError


def open_adapter(path: str | Path) -> AdapterCheckpoint:
    """Return the whole adapter in `path`: of a run its best checkpoint (keep_best) or the newest sound one, with
    `notes` on those passed over.

    What the folder holds decides, not its name.
    Raises UserError where there is none, or where it is damaged.
    """
    path = Path(path)
    if path.is_file() and (path.parent / peft.CONFIG_FILE).exists():
        raise UserError(f"adapter {path}: is a file of an adapter", f"name its folder, {path.parent}")
    if not path.is_dir():
        raise UserError(f"adapter {path}: is not a folder", "name a run, its checkpoint, shards or a PEFT folder")
    if (path / peft.CONFIG_FILE).exists():
        return peft.read_peft(path)
    theirs = None if (path / MANIFEST).exists() else reference_folder(path)
    if theirs is not None:
        return read_reference(theirs)
    if has_shards(path):
        if is_iteration(path) or (path / MANIFEST).exists():
            verified(path)
        return _by_expert(read_adapter(path))
    run = path.parent if path.name == "checkpoints" else path
    saved, complaints = result_of(run)
    if saved is not None:
        return replace(_by_expert(read_adapter(saved.folder)), notes=tuple(complaints))
    if complaints:
        export = export_folder(run)
        raise UserError(
            f"adapter {path}: no checkpoint of this run is sound: {'; '.join(complaints)}",
            f"name its export, {export}" if (export / peft.CONFIG_FILE).exists() else "name another run or adapter",
        )
    raise UserError(
        f"adapter {path}: holds neither {peft.CONFIG_FILE} (PEFT), mp_rank_XX_pp_rank_YYY (shards) nor "
        "checkpoints/iter_* (a run)",
        "name one of these",
    )


def _by_expert(adapter: AdapterCheckpoint) -> AdapterCheckpoint:
    """Return an adapter whose factors are each expert's own; without moments where experts shared some."""
    if adapter.lora_config.get("expert_count") is None:
        return adapter
    tensors, fields = by_expert(adapter.tensors, adapter.lora_config)
    return replace(adapter, tensors=tensors, lora_config=fields, optimizer=None)
