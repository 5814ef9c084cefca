"""What in an output_dir is a run's own: names, the marker that says so, and what is removed from there.

A run claims the names below before it writes there: .megalora.json lists them. What has one of these names and is not
claimed, or is a symbolic link, is not megalora's: a run refuses to start there rather than write or remove it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalora.card import CARD, read_card
from megalora.checkpoint.manifest import MANIFEST
from megalora.errors import UserError
from megalora.files import aside_of, read_json, refuse_link, write_file
from megalora.tokenizer_files import remove_tokenizer

MARKER = ".megalora.json"
TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"  # where a run exported another checkpoint than its newest
PROBE = ".probe"  # in the folder of the checkpoints
ITERATION = re.compile(r"iter_(\d{7,})")
EXPORT_FILES = ("adapter_config.json", "adapter_model.safetensors", MANIFEST)
_PENDING = ".overwrite"  # in output_dir: its run is to be removed, and is there still
_CHECKPOINTS, _EXPORT, _TOKENIZER, _EVENTS = "checkpoints", "peft", "tokenizer", "runs"
_LINES = ("metrics.jsonl", "eval_metrics.jsonl", "replies.jsonl", "trackers.json", "metrics.png")
RUN_FILE = "run.yaml"  # the flags of the run; another's file of that name is left alone
_OWN = (_CHECKPOINTS, _EXPORT, _TOKENIZER, _EVENTS, *_LINES)
_APPENDED = ("logs", "profile", MARKER)  # nothing is removed there


def checkpoints_folder(output_dir: str | Path) -> Path:
    return Path(output_dir) / _CHECKPOINTS


def export_folder(output_dir: str | Path) -> Path:
    """Return where a run leaves its adapter for PEFT."""
    return Path(output_dir) / _EXPORT


def tokenizer_folder(output_dir: str | Path) -> Path:
    """Return where a run leaves its tokenizer and chat template."""
    return Path(output_dir) / _TOKENIZER


# ---- what is a run's own ----


def check_own(output_dir: str | Path) -> None:
    """Raise UserError where a run would write over what no run of megalora has written, or behind a link."""
    output_dir = Path(output_dir)
    for name in (*_OWN, *_APPENDED):
        refuse_link(output_dir / name)
    owned = _owned(output_dir)
    foreign = [name for name in _OWN if name not in owned and _holds_something(output_dir / name)]
    if foreign:
        raise UserError(
            f"output_dir {output_dir}: holds {', '.join(foreign)} of another program, which a run would write over",
            "move it elsewhere, or name another output_dir",
        )


def claim(output_dir: str | Path, flags: str = "", layout: Mapping[str, Any] | None = None) -> str | None:
    """Mark what a run writes in output_dir as its own. For one rank, after `check_own`. Raises UserError.

    flags  the text of run.yaml. It is not written where the user has a file of that name there: a note that says so is
           returned.
    layout  how the run is divided over its processes, which the board draws; it is kept in the mark
    """
    output_dir = Path(output_dir)
    file = output_dir / RUN_FILE
    foreign = file.is_symlink() or (file.exists() and RUN_FILE not in _owned(output_dir))
    owns = _OWN if foreign else (*_OWN, RUN_FILE)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        told = {"format": 1, "owns": owns} | ({} if layout is None else {"layout": layout})
        write_file(output_dir / MARKER, (json.dumps(told) + "\n").encode())
        if flags and not foreign:
            write_file(file, flags.encode())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"output_dir {output_dir}: cannot be written ({error.strerror or error})",
            f"{'free space' if full else 'make it writable'}, or name another",
        ) from None
    return f"{file} is yours: the flags of this run are not written there" if flags and foreign else None


def _owned(output_dir: Path) -> frozenset[str]:
    marker = output_dir / MARKER
    if marker.exists():
        remedy = "remove it: a run that has checkpoints goes on without; of one that has none, remove output_dir"
        owns = read_json(marker, remedy).get("owns")
        return frozenset(name for name in owns if isinstance(name, str)) if isinstance(owns, list) else frozenset()
    # Runs of before there was a marker. No other program gives a checkpoint this name and a manifest.
    checkpoints = checkpoints_folder(output_dir).glob(f"iter_*/{MANIFEST}")
    return frozenset(_OWN) if any(ITERATION.fullmatch(file.parent.name) for file in checkpoints) else frozenset()


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


# ---- what is removed ----


def announce_removal(output_dir: str | Path) -> None:
    """Note in output_dir that the run in it is to be removed, for who is started again before that is done.

    Raises UserError where it may not. For one rank.
    """
    try:
        write_file(Path(output_dir) / _PENDING, b"")
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: cannot be written to ({error})", "name another one") from None


def cancel_removal(output_dir: str | Path) -> None:
    """Keep the run in output_dir: take the note of `announce_removal` back, if there is one."""
    with contextlib.suppress(OSError):  # on a read-only file system there is none
        (Path(output_dir) / _PENDING).unlink(missing_ok=True)


def removal_is_pending(output_dir: str | Path) -> bool:
    return (Path(output_dir) / _PENDING).exists()


def in_run(folder: str | Path, output_dir: str | Path) -> bool:
    """Return whether `remove_run` would remove what lies in `folder`, or some of it."""
    folder, output_dir = Path(folder).resolve(), Path(output_dir).resolve()
    removed = (checkpoints_folder(output_dir), export_folder(output_dir), tokenizer_folder(output_dir))
    return folder == output_dir or any(folder.is_relative_to(part) for part in removed)


def remove_export(output_dir: str | Path) -> None:
    """Remove the adapter for PEFT that an earlier run left: it could be mistaken for this run's. Raises UserError."""
    check_own(output_dir)
    folder = export_folder(output_dir)
    try:
        (checkpoints_folder(output_dir) / BEST).unlink(missing_ok=True)
        _clear_export(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be cleared ({error})", "remove it, or name another output_dir") from None


def remove_run(output_dir: str | Path) -> None:
    """Remove what a run of megalora wrote into output_dir (checkpoints, events, metrics, export, tokenizer), no more.

    Raises UserError where something there is not a run's, or may not be removed. For one rank.
    """
    output_dir = Path(output_dir)
    check_own(output_dir)
    checkpoints, events = checkpoints_folder(output_dir), output_dir / _EVENTS
    try:
        for file in (checkpoints / TRACKER, checkpoints / BEST, checkpoints / PROBE):
            file.unlink(missing_ok=True)
            aside_of(file).unlink(missing_ok=True)
        for folder in [*checkpoints.glob("iter_*"), *checkpoints.glob(".iter_*.tmp")]:
            if ITERATION.fullmatch(folder.name.removeprefix(".").removesuffix(".tmp").removesuffix(".old")):
                shutil.rmtree(folder)
        for file in [*events.glob("events.out.tfevents.*"), *(output_dir / name for name in _LINES)]:
            file.unlink(missing_ok=True)
        _clear_export(export_folder(output_dir))
        remove_tokenizer(tokenizer_folder(output_dir))
        for folder in (tokenizer_folder(output_dir), checkpoints, events):
            _remove_empty(folder)
        (output_dir / _PENDING).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: cannot be cleared ({error})", "name another one") from None


def _clear_export(folder: Path) -> None:
    if read_card(folder) is not None:
        (folder / CARD).unlink()
    for name in EXPORT_FILES:
        (folder / name).unlink(missing_ok=True)
    remove_tokenizer(folder)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
