"""The checkpoints of a run: written aside, verified by a manifest, found again.

{output_dir}/checkpoints/iter_0000010/manifest.json         sizes and SHA-256 of its files, identity
{output_dir}/checkpoints/iter_0000010/mp_rank_XX_pp_rank_YYY/...
{output_dir}/checkpoints/latest_checkpointed_iteration.txt  "10", moved when all of it is on disk
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megalora.checkpoint.base.shards import read_json
from megalora.checkpoint.disk import aside_of, sha256, sync_folder, write_file
from megalora.data.tokenizer import remove_tokenizer
from megalora.errors import UserError

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = 1
_PROBE = ".probe"
_PENDING = ".overwrite"  # in output_dir: its run is to be removed, and is there still
_ITERATION = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint whose files are all as they were written; `identity` says of which run."""

    step: int
    folder: Path
    identity: dict[str, str]


def checkpoints_folder(output_dir: str | Path) -> Path:
    return Path(output_dir) / "checkpoints"


def export_folder(output_dir: str | Path) -> Path:
    """Where a run leaves its adapter for PEFT."""
    return Path(output_dir) / "peft"


def tokenizer_folder(output_dir: str | Path) -> Path:
    """Where a run leaves its tokenizer and chat template."""
    return Path(output_dir) / "tokenizer"


def iteration_folder(output_dir: str | Path, step: int) -> Path:
    return checkpoints_folder(output_dir) / f"iter_{step:07d}"


def is_iteration(folder: Path) -> bool:
    """Whether the folder has the name of one checkpoint."""
    return _ITERATION.fullmatch(folder.name) is not None


# ---- writing ----


class CheckpointWriter:
    """Writes the checkpoints of a run; every rank has one and calls `save` together.

    writes   this rank has a shard of its own to write (one dp rank of each tp and pp rank)
    is_main  this rank makes the folder, the manifest and the tracker (exactly one rank)
    gather   collective: the objects of all ranks, in rank order, on every rank
    save_total_limit  how many of the newest checkpoints are kept; None: all
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        writes: bool,
        is_main: bool,
        gather: Callable[[Any], list[Any]],
        save_total_limit: int | None = None,
    ):
        assert save_total_limit is None or save_total_limit >= 1, save_total_limit
        self.output_dir = Path(output_dir)
        self.writes, self._is_main, self._gather = writes, is_main, gather
        self._limit = save_total_limit

    def check_writable(self) -> None:
        """Raises UserError where a save would fail at once. For one rank, before the run spends any time."""
        probe = checkpoints_folder(self.output_dir) / _PROBE
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            write_file(probe, b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be written to {probe.parent} ({error.strerror or error}): make it writable, "
                f"name another output_dir, or give --save false"
            ) from None

    def save(self, step: int, write_shard: Callable[[Path], Path] | None, identity: Mapping[str, str]) -> Path:
        """Writes the checkpoint of `step`; returns its folder. Collective.

        write_shard  called on the ranks that write with the folder to write in; returns the folder it made
        identity     what makes this run another than its neighbours (see `identity_difference`)
        Where any rank fails, every rank raises UserError, and the checkpoints from before stay as they are.
        """
        final = iteration_folder(self.output_dir, step)
        aside = final.with_name(final.name + ".tmp")
        try:
            self._together(self._is_main, lambda: self._prepare(aside), aside)
            written = self._together(self.writes, lambda: _write(aside, write_shard), aside)
            files = {name: entry for part in written if part for name, entry in part.items()}
            self._together(self._is_main, lambda: _finish(step, aside, final, files, identity), aside)
        except BaseException:
            if self._is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        self._together(self._is_main and self._limit is not None, lambda: self._prune(step), final)
        return final

    def _together(self, mine: bool, work: Callable[[], Any], where: Path) -> list[Any]:
        """Does `work` on the ranks where it is theirs; the results of all ranks, or an error on all."""
        result, error = None, None
        if mine:
            try:
                result = work()
            except Exception as raised:  # whatever it is, the other ranks must not wait for this one
                error = raised
        try:
            outcomes = self._gather((result, None if error is None else _explained(error, where)))
        except RuntimeError as lost:  # what torch.distributed raises when another rank has gone
            raise UserError(
                f"checkpoint {where.with_suffix('')}: not finished, because another rank has left ({lost!s:.160}): the "
                f"checkpoints before it are whole, so the same command goes on from the newest of them"
            ) from None
        if error is not None and not isinstance(error, (OSError, UserError)):
            raise error
        messages = [message for _, message in outcomes if message is not None]
        if messages:
            raise UserError(messages[0])
        return [result for result, _ in outcomes]

    def _prepare(self, aside: Path) -> None:
        aside.parent.mkdir(parents=True, exist_ok=True)
        for stale in aside.parent.glob("iter_*.tmp"):  # of a run that was killed while it saved
            shutil.rmtree(stale)
        aside.mkdir()

    def _prune(self, step: int) -> None:
        older = [folder for saved, folder in _iterations(self.output_dir) if saved < step]
        for folder in older[self._limit - 1 :]:
            doomed = folder.with_name(folder.name + ".tmp")  # never half a checkpoint under its own name
            try:
                folder.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                raise UserError(
                    f"checkpoint {folder}: cannot be removed, as save_total_limit asks ({error.strerror or error}): "
                    f"remove it, or leave save_total_limit out"
                ) from None


def _explained(error: Exception, where: Path) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return (
            f"checkpoint {where.with_suffix('')}: cannot be written ({error.strerror or error}): "
            "free space, or make output_dir writable"
        )
    return f"checkpoint {where.with_suffix('')}: cannot be written ({type(error).__name__}: {error})"


def _not_shared(aside: Path) -> str:
    return f"output_dir {aside.parent.parent}: is not one folder on all nodes: name one on a shared disk"


def _write(aside: Path, write_shard: Callable[[Path], Path]) -> dict[str, dict[str, Any]]:
    """Writes this rank's shard; size and hash of each of its files, by name relative to the checkpoint."""
    if not aside.is_dir():
        raise UserError(_not_shared(aside))
    shard = write_shard(aside)
    files = {}
    for file in sorted(shard.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            files[file.relative_to(aside).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
    sync_folder(shard)
    return files


def _finish(step: int, aside: Path, final: Path, files: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Puts a checkpoint whose files are all written in its place, then moves the tracker."""
    for name, entry in files.items():
        if not (aside / name).is_file() or (aside / name).stat().st_size != entry["size"]:
            raise UserError(_not_shared(aside))
    body = {"format": FORMAT, "step": step, "identity": dict(identity), "files": dict(files)}
    write_file(aside / MANIFEST, json.dumps(body | {"sha256": _digest(body)}, indent=1, sort_keys=True).encode())
    if final.exists():  # a damaged one, which the run went back beyond
        replaced = final.with_name(f"{final.name}.old.tmp")
        final.rename(replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    aside.rename(final)
    sync_folder(final.parent)
    write_file(final.parent / TRACKER, f"{step}\n".encode())


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ---- finding ----


def newest_sound(output_dir: str | Path) -> tuple[SavedCheckpoint | None, list[str]]:
    """The newest checkpoint with every file as it was written, and a line on each damaged one.

    Reads and hashes the files from the newest on until one is sound: for one rank, which tells the rest.
    """
    complaints: list[str] = []
    found = None
    for _, folder in _iterations(output_dir):
        try:
            found = verified(folder)
            break
        except UserError as error:
            complaints.append(str(error))
    complaint = _tracker_complaint(checkpoints_folder(output_dir) / TRACKER, found)
    return found, complaints + ([complaint] if complaint else [])


def verified(folder: str | Path) -> SavedCheckpoint:
    """The checkpoint in an iteration folder. Raises UserError that names a file that is not as written."""
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise UserError(f"checkpoint {folder}: has no {MANIFEST}, so it was not finished: take an older one")
    body = read_json(manifest)
    try:
        digest = body.pop("sha256")
        if digest != _digest(body):
            raise ValueError("its own sum does not match")
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r}, but this version reads {FORMAT}")
        step, identity = int(body["step"]), dict(body["identity"])
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        if not files:
            raise ValueError("lists no file")
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"names {name!r}, which is outside the folder")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"checkpoint {folder}: {MANIFEST} is damaged ({error}): take an older one") from None
    named = _ITERATION.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise UserError(f"checkpoint {folder}: was written as step {step}: give it the name iter_{step:07d} again")
    for name, (size, digest) in files.items():
        file = folder / name
        try:
            actual = file.stat().st_size
            if actual != size:
                raise UserError(f"checkpoint {folder}: {name} has {actual} bytes, not {size}: take an older one")
            if sha256(file) != digest:
                raise UserError(f"checkpoint {folder}: {name} is damaged (SHA-256 differs): take an older one")
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise UserError(f"checkpoint {folder}: {name} {reason}: take an older one") from None
    return SavedCheckpoint(step, folder, identity)


def _iterations(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints under their final names, sound or not, newest first."""
    folder = checkpoints_folder(output_dir)
    if not folder.is_dir():
        return []
    found = [(match, child) for child in folder.iterdir() if (match := _ITERATION.fullmatch(child.name))]
    return sorted(((int(match[1]), child) for match, child in found), reverse=True)


def _tracker_complaint(tracker: Path, found: SavedCheckpoint | None) -> str | None:
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None if found is None else f"{tracker}: is missing: step {found.step} is the newest sound checkpoint"
    except (OSError, ValueError) as error:
        return f"{tracker}: cannot be read ({error})"
    if found is None:
        return f"{tracker}: says {text[:20]!r}, but there is no sound checkpoint"
    if text != str(found.step):
        return f"{tracker}: says {text[:20]!r}, but step {found.step} is the newest sound checkpoint"
    return None


def identity_difference(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Each field in which two runs differ, with both values, for a message; "" where they are the same run."""
    return "; ".join(
        f"{name}: {found.get(name, '(none)')} there, {wanted.get(name, '(none)')} here"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    )


# ---- removing ----

_EXPORT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_RUN_FILES = ("metrics.jsonl", "eval_metrics.jsonl")


def announce_removal(output_dir: str | Path) -> None:
    """Notes in output_dir that the run in it is to be removed, for who is started again before that is done.

    Raises UserError where it may not. For one rank.
    """
    try:
        (Path(output_dir) / _PENDING).touch()
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: cannot be written to ({error}): name another one") from None


def cancel_removal(output_dir: str | Path) -> None:
    """The run in output_dir stays: takes the note of `announce_removal` back, where there is one."""
    with contextlib.suppress(OSError):  # on a read-only file system there is none
        (Path(output_dir) / _PENDING).unlink(missing_ok=True)


def removal_is_pending(output_dir: str | Path) -> bool:
    return (Path(output_dir) / _PENDING).exists()


def in_run(folder: str | Path, output_dir: str | Path) -> bool:
    """Whether `remove_run` would remove what lies in `folder`, or some of it."""
    folder, output_dir = Path(folder).resolve(), Path(output_dir).resolve()
    removed = checkpoints_folder(output_dir), export_folder(output_dir)
    return folder == output_dir or any(folder.is_relative_to(part) for part in removed)


def remove_export(output_dir: str | Path) -> None:
    """Removes the adapter for PEFT that a run of fewer steps has left. Raises UserError where it may not."""
    folder = export_folder(output_dir)
    try:
        for name in _EXPORT_FILES:
            (folder / name).unlink(missing_ok=True)
        remove_tokenizer(folder)
        _remove_empty(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be cleared ({error}): remove it, or name another output_dir") from None


def remove_run(output_dir: str | Path) -> None:
    """Removes what a run of megalora writes into output_dir (checkpoints, events, metrics, export), no more.

    Raises UserError where it may not. For one rank.
    """
    output_dir = Path(output_dir)
    checkpoints, events = checkpoints_folder(output_dir), output_dir / "runs"
    try:
        for file in (checkpoints / TRACKER, checkpoints / _PROBE):
            file.unlink(missing_ok=True)
            aside_of(file).unlink(missing_ok=True)
        for folder in checkpoints.glob("iter_*"):
            if _ITERATION.fullmatch(folder.name.removesuffix(".tmp").removesuffix(".old")):
                shutil.rmtree(folder)
        for file in [*events.glob("events.out.tfevents.*"), *(output_dir / name for name in _RUN_FILES)]:
            file.unlink(missing_ok=True)
        remove_export(output_dir)
        remove_tokenizer(tokenizer_folder(output_dir))
        _remove_empty(tokenizer_folder(output_dir))
        _remove_empty(checkpoints)
        _remove_empty(events)
        (output_dir / _PENDING).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: cannot be cleared ({error}): name another one") from None


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
