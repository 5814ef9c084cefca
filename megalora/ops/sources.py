"""Tells the states of the compiled ops' sources (`csrc/`) apart. setup.py loads this file by itself: stdlib only."""

import hashlib
from pathlib import Path

ENDINGS = (".cpp", ".cu", ".h")


def digest(folder: Path) -> str:
    """Return 16 hexadecimal digits of the names and contents of the sources in `folder` and the folders inside it."""
    whole = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.suffix in ENDINGS and path.is_file())
    for name, file in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        contents = file.read_bytes()
        whole.update(f"{name}\0{len(contents)}\0".encode() + contents)
    return whole.hexdigest()[:16]
