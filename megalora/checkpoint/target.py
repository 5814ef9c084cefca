"""A folder that appears when all of it is written, or not at all; and the small files that go along with weights."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalora.checkpoint.adapter import peft
from megalora.checkpoint.base.hf import INDEX, check_stays, is_hf
from megalora.checkpoint.layout import has_shards
from megalora.checkpoint.run.folder import MARKER
from megalora.errors import UserError
from megalora.files import atomic_folder

_WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .tflite .npz .ot .index.json .lock .tmp".split()
)
_TEMPLATES = "additional_chat_templates"
_SPARE_BYTES = 64 << 20  # names, headers, small files


class TargetFolder:
    """Where a new model, adapter or set of shards goes.

    overwrite  a model, adapter or set of shards that is there already may be replaced
    sources    what is read to make it: the target may not be one of them, nor hold one
    Raises UserError where the target may not be written.
    """

    def __init__(self, path: str | Path, overwrite: bool, sources: Sequence[str | Path]):
        self.path = Path(path).resolve()
        self._shown = path
        for source in sources:
            if Path(source).resolve().is_relative_to(self.path):
                raise UserError(f"output {path}: holds {source}, which is read", "name another folder")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {path}: is a file", "name a folder")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not overwrite:
                raise UserError(f"output {path}: exists", "give --overwrite true to replace it, or name another folder")
            replaced = is_hf(self.path) or has_shards(self.path) or (self.path / peft.CONFIG_FILE).exists()
            if not replaced or (self.path / MARKER).exists():
                raise UserError(
                    f"output {path}: holds other things than a model or an adapter, so it is not replaced",
                    "remove it yourself, or name another folder",
                )
        self._home = next(folder for folder in self.path.parents if folder.exists())
        if not (self._home.is_dir() and os.access(self._home, os.W_OK | os.X_OK)):
            raise UserError(f"output {path}: {self._home} cannot be written in", "name another folder")

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self._home).free

    def check_room(self, nbytes: int) -> None:
        """Raise UserError where the disk has no room for files of that size beside what is there."""
        if self.free_bytes < nbytes + _SPARE_BYTES:
            needed = (nbytes + _SPARE_BYTES) / 1e9
            raise UserError(
                f"output {self._shown}: needs {needed:.2f} GB, but {self.free_bytes / 1e9:.2f} GB are free",
                "free space, or name a folder on another disk",
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Give a folder beside the target to write in: it takes the target's name at the end, or is removed.

        Raises UserError where the disk fails or is full.
        """
        try:
            with atomic_folder(self.path) as aside:
                yield aside
        except BlockingIOError:
            raise UserError(f"output {self._shown}: is being written by another process", "wait for it") from None
        except OSError as error:
            raise UserError(
                f"output {self._shown}: cannot be written ({error.strerror or error})",
                "free space, or name another folder",
            ) from None


def companions(folder: str | Path) -> dict[str, Path]:
    """Return the files of a model's folder beside its weights, by path below it: config, tokenizer, chat template,
    licence.

    Raises UserError for a link that leads out of the folder.
    """
    folder = Path(folder)
    found = [file for file in folder.iterdir() if file.is_file() and not _is_weights(file.name)]
    if (folder / _TEMPLATES).is_dir():
        found += [file for file in (folder / _TEMPLATES).iterdir() if file.suffix == ".jinja"]
    for file in found:
        check_stays(folder, file)
    return {file.relative_to(folder).as_posix(): file for file in sorted(found)}


def _is_weights(name: str) -> bool:
    return name.startswith(".") or name == INDEX or any(name.endswith(ending) for ending in _WEIGHTS)
