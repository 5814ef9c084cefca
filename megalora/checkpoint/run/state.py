"""The checkpoints of a run: written aside, verified by a manifest, found again.

{output_dir}/checkpoints/iter_0000010/manifest.json         sizes and SHA-256 of its files, identity
{output_dir}/checkpoints/iter_0000010/mp_rank_XX_pp_rank_YYY/...
{output_dir}/checkpoints/latest_checkpointed_iteration.txt  "10", moved when all of it is on disk
{output_dir}/checkpoints/best_checkpointed_iteration.txt    where keep_best exported another checkpoint than the newest
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.checkpoint.manifest import MANIFEST, entry_of, verify, write_manifest
from megalora.checkpoint.run.folder import BEST, ITERATION, PROBE, TRACKER, checkpoints_folder
from megalora.errors import UserError
from megalora.files import put_in_place, read_bytes, sync_folder, write_file


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint whose files are all as they were written; `identity` says of which run."""

    step: int
    folder: Path
    identity: dict[str, str]


def iteration_folder(output_dir: str | Path, step: int) -> Path:
    return checkpoints_folder(output_dir) / f"iter_{step:07d}"


def is_iteration(folder: Path) -> bool:
    """Return whether the folder has the name of one checkpoint."""
    return ITERATION.fullmatch(folder.name) is not None


# ---- writing ----


class CheckpointWriter:
    """Writes the checkpoints of a run; every rank has one and calls `save` together.

    writes   this rank has a shard of its own to write (one dp rank of each tp and pp rank)
    is_main  this rank makes the folder, the manifest and the tracker (exactly one rank)
    gather   collective: the objects of all ranks, in rank order, on every rank
    save_total_limit  how many of the newest checkpoints are kept; None: all
    spared            the step of a checkpoint that is kept besides these, or None
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
        self.spared: int | None = None

    def check_writable(self) -> None:
        """Raise UserError where a save would fail at once. For one rank, before the run spends any time."""
        probe = checkpoints_folder(self.output_dir) / PROBE
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            write_file(probe, b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be written to {probe.parent} ({error.strerror or error})",
                "make it writable, name another output_dir, or give --save false",
            ) from None

    def save(self, step: int, write_shard: Callable[[Path], Path] | None, identity: Mapping[str, str]) -> Path:
        """Write the checkpoint of `step`; return its folder. Collective.

        write_shard  called on the ranks that write with the folder to write in; returns the folder it made
        identity     fields that distinguish this run from others (see `identity_difference`)
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
        """Do `work` on the ranks where it is theirs; return the results of all ranks, or an error on all."""
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
                "checkpoints before it are whole",
                "give the same command again: it goes on from the newest of them",
            ) from None
        if error is not None and not isinstance(error, (OSError, UserError)):
            raise error
        messages = [message for _, message in outcomes if message is not None]
        if messages:
            raise UserError(*messages[0])
        return [result for result, _ in outcomes]

    def _prepare(self, aside: Path) -> None:
        aside.parent.mkdir(parents=True, exist_ok=True)
        for pattern in ("iter_*.tmp", ".iter_*.tmp"):  # of a run that was killed while it saved
            for stale in aside.parent.glob(pattern):
                shutil.rmtree(stale)
        aside.mkdir()

    def _prune(self, step: int) -> None:
        older = [folder for saved, folder in _iterations(self.output_dir) if saved < step and saved != self.spared]
        for folder in older[self._limit - 1 :]:
            doomed = folder.with_name(folder.name + ".tmp")  # never half a checkpoint under its own name
            try:
                folder.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                raise UserError(
                    f"checkpoint {folder}: cannot be removed, as save_total_limit asks ({error.strerror or error})",
                    "remove it, or leave save_total_limit out",
                ) from None


def _explained(error: Exception, where: Path) -> tuple[str, str | None]:
    """Return message and hint of the UserError that all ranks raise."""
    if isinstance(error, UserError):
        return error.message, error.hint
    said = f"checkpoint {where.with_suffix('')}: cannot be written"
    if isinstance(error, OSError):
        remedy = "free space, or make output_dir writable, and give the same command again"
        return f"{said} ({error.strerror or error})", remedy
    return f"{said} ({type(error).__name__}: {error})", None


def _not_shared(aside: Path) -> UserError:
    return UserError(f"output_dir {aside.parent.parent}: is not one folder on all nodes", "name one on a shared disk")


def _write(aside: Path, write_shard: Callable[[Path], Path]) -> dict[str, dict[str, Any]]:
    """Write this rank's shard; return size and hash of each of its files, by name relative to the checkpoint."""
    if not aside.is_dir():
        raise _not_shared(aside)
    shard = write_shard(aside)
    files = {}
    for file in sorted(shard.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            files[file.relative_to(aside).as_posix()] = entry_of(file)
    sync_folder(shard)
    return files


def _finish(step: int, aside: Path, final: Path, files: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Put a checkpoint whose files are all written in its place, then move the tracker."""
    for name, entry in files.items():
        if not (aside / name).is_file() or (aside / name).stat().st_size != entry["size"]:
            raise _not_shared(aside)
    write_manifest(aside, files, step=step, identity=dict(identity))
    put_in_place(aside, final)  # a damaged one, which the run went back beyond, may be there
    write_file(final.parent / TRACKER, f"{step}\n".encode())


# ---- finding ----


def newest_sound(output_dir: str | Path) -> tuple[SavedCheckpoint | None, list[str]]:
    """Return the newest checkpoint with every file as it was written, and a line on each damaged one.

    Reads and hashes the files from the newest on until one is sound: for one rank, which tells the rest.
    """
    complaints: list[str] = []
    found = None
    for _, folder in _iterations(output_dir):
        try:
            found = verified(folder)
            break
        except UserError as error:
            complaints.append(error.message)  # not the remedy: an older one is taken here
    complaint = _tracker_complaint(checkpoints_folder(output_dir) / TRACKER, found)
    return found, complaints + ([complaint] if complaint else [])


def newest_file(output_dir: str | Path, name: str) -> Path | None:
    """Return the file `name` of a shard of the newest checkpoint that has one, unverified; None where there is none."""
    for _, folder in _iterations(output_dir):
        if found := sorted(folder.glob(f"*/{name}")):
            return found[0]
    return None


def note_best(output_dir: str | Path, step: int | None) -> None:
    """Note that the result of the run is the checkpoint of `step`; None: its newest. For one rank."""
    file = checkpoints_folder(output_dir) / BEST
    if step is None:
        file.unlink(missing_ok=True)
    else:
        write_file(file, f"{step}\n".encode())


def result_of(output_dir: str | Path) -> tuple[SavedCheckpoint | None, list[str]]:
    """Return the checkpoint that is the result of a run, and lines for the user.

    It is the best one where the run noted that, else the newest sound one.
    """
    with contextlib.suppress(OSError, ValueError):
        step = int(read_bytes(checkpoints_folder(output_dir) / BEST, most=1 << 10))
        newest = next((step for step, _ in _iterations(output_dir)), step)
        if step != newest:
            try:
                best = verified(iteration_folder(output_dir, step))
            except UserError as error:
                found, complaints = newest_sound(output_dir)
                return found, [f"the checkpoint with the lowest evaluation loss cannot be used: {error}", *complaints]
            lowest = f"{best.folder}: has the lowest evaluation loss of the run, and is taken"
            return best, [f"{lowest}; the newest checkpoint is of step {newest}"]
    return newest_sound(output_dir)


def verified(folder: str | Path) -> SavedCheckpoint:
    """Return the checkpoint in an iteration folder. Raises UserError that names a file that is not as written."""
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise UserError(f"checkpoint {folder}: has no {MANIFEST}, so it was not finished", "take an older one")
    named = ITERATION.fullmatch(folder.name)

    def read(body: Mapping[str, Any]) -> tuple[int, dict[str, str]]:
        step, identity = int(body["step"]), dict(body["identity"])
        if named and int(named[1]) != step:
            raise UserError(f"checkpoint {folder}: was written as step {step}", f"rename it to iter_{step:07d} again")
        return step, identity

    step, identity = verify(folder, "checkpoint", "take an older one", read)
    return SavedCheckpoint(step, folder, identity)


def _iterations(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints under their final names, sound or not, newest first."""
    folder = checkpoints_folder(output_dir)
    if not folder.is_dir():
        return []
    found = [(match, child) for child in folder.iterdir() if (match := ITERATION.fullmatch(child.name))]
    return sorted(((int(match[1]), child) for match, child in found), reverse=True)


def _tracker_complaint(tracker: Path, found: SavedCheckpoint | None) -> str | None:
    try:
        text = read_bytes(tracker, most=1 << 10).decode().strip()
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
    """Return each field in which two runs differ, with both values, for a message; "" where they are the same run."""
    return "; ".join(
        f"{name}: {found.get(name, '(none)')} there, {wanted.get(name, '(none)')} here"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    )
