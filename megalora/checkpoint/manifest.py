"""manifest.json: size and SHA-256 of each file of a folder, with a sum of its own, so that every change is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megalora.errors import UserError
from megalora.files import check_regular, read_json, sha256, write_file

MANIFEST = "manifest.json"
FORMAT = 1
Entries = dict[str, dict[str, Any]]


def entry_of(file: Path) -> dict[str, Any]:
    """Return what a manifest says of a file. Raises OSError."""
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]], **fields: Any) -> None:
    """Write the manifest of a folder whose files are all written. Raises OSError.

    files   `entry_of` each, by path below the folder
    fields  plain values that are kept beside
    """
    body = {"format": FORMAT, **fields, "files": dict(files)}
    write_file(folder / MANIFEST, json.dumps(body | {"sha256": digest(body)}, indent=1, sort_keys=True).encode())


def verify(folder: Path, what: str, remedy: str, read: Callable[[Mapping[str, Any]], Any] = lambda body: None) -> Any:
    """Check every file of a folder that has a manifest; return what `read` makes of the manifest's fields.

    what, remedy  what the folder is, and what to do where it is damaged, for messages
    read          called before any file is hashed; may raise UserError
    Raises UserError that names the file that is not as it was written.
    """
    body = read_json(folder / MANIFEST, remedy)
    try:
        own = body.pop("sha256")
        if own != digest(body):
            raise ValueError("its own sum does not match")
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r}, but this version reads {FORMAT}")
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        if not files:
            raise ValueError("lists no file")
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"names {name!r}, which is outside the folder")
        found = read(body)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{what} {folder}: {MANIFEST} is damaged ({error})", remedy) from None
    for name, (size, wanted) in files.items():
        try:
            _check(folder / name, size, wanted)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise UserError(f"{what} {folder}: {name} {reason}", remedy) from None
        except _Damaged as damaged:
            raise UserError(f"{what} {folder}: {name} {damaged}", remedy) from None
    return found


class _Damaged(Exception):
    """How a file differs from what was written."""


def _check(file: Path, size: int, wanted: str) -> None:
    check_regular(file)
    if (actual := file.stat().st_size) != size:
        raise _Damaged(f"has {actual} bytes, not {size}")
    if sha256(file) != wanted:
        raise _Damaged("is damaged (SHA-256 differs)")


def digest(body: Mapping[str, Any]) -> str:
    """Return the sum that a manifest has of itself."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
