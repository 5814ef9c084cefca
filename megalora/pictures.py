"""Image files beside a text: found, read and checked with pillow, which is an optional package. No torch."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import read_bytes

MOST_BYTES = 1 << 28  # of a file
MOST_PIXELS = 1 << 27  # which a small file may claim to have; their bytes are held while one is read
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that runs another program, as EPS does


@dataclass(frozen=True)
class Picture:
    """An image that stands before a text.

    path    of the file
    digest  SHA-256 of its contents: images of the same contents are one
    tokens  that it takes, at the start of its document
    """

    path: str
    digest: str
    tokens: int


def find_picture(path: str | Path, tokens: int) -> Picture:
    """Return the image in a file, which is decoded once to be sure of it. Raises UserError that names the file."""
    data = _read(path)
    _decoded(data, path)
    return Picture(str(path), hashlib.sha256(data).hexdigest(), tokens)


def open_picture(picture: Picture) -> Any:
    """Return it as a PIL.Image in RGB. Raises UserError where the file is another one now, or cannot be read."""
    data = _read(picture.path)
    if hashlib.sha256(data).hexdigest() != picture.digest:
        raise UserError(
            f"image {picture.path!r}: has changed since the rows were read",
            "put it back, or name another --data_cache, where the rows are read again",
        )
    return _decoded(data, picture.path)


def check_pillow(what: str) -> Any:
    """Return the module PIL.Image. Raises UserError where pillow is not installed; what: names who needs it."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError(f"{what} needs the package pillow to read images", "pip install pillow") from None
    return Image


def _read(path: str | Path) -> bytes:
    try:
        return read_bytes(Path(path), MOST_BYTES)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"image {str(path)!r}: cannot be read ({why})", "correct the path") from None


def _decoded(data: bytes, path: str | Path) -> Any:
    image = check_pillow(f"image {str(path)!r}")
    try:
        found = image.open(io.BytesIO(data), formats=FORMATS)
        if found.width * found.height > MOST_PIXELS:
            size = f"{found.width} x {found.height} pixels, more than {MOST_PIXELS:,}"
            raise UserError(f"image {str(path)!r}: has {size}", "scale it down")
        return found.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes a decoder raise
        kinds = ", ".join(FORMATS)
        raise UserError(
            f"image {str(path)!r}: is not an image that can be read ({type(error).__name__})", f"give a file of {kinds}"
        ) from None
