"""Image files beside a text: found, read and checked with pillow, which is an optional package. No torch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.errors import UserError
from megalora.files import read_bytes

MOST_BYTES = 1 << 28  # of a file
MOST_PIXELS = 1 << 27  # which a small file may claim to have; their bytes are held while one is read
_ORIENTATION = 0x0112  # of EXIF, and what makes an image upright, as PIL.ImageOps.exif_transpose has it
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
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


def decode_picture(data: bytes, name: str, formats: Sequence[str], most_pixels: int) -> Any:
    """Return the image in the bytes of a file as a PIL.Image in RGB, upright; of an animation the first one.

    name  of the image in errors
    Raises UserError for what is none of these formats, is damaged, or has more pixels.
    """
    image = check_pillow(name)
    try:
        found = image.open(io.BytesIO(data), formats=formats)
        if found.width * found.height > most_pixels:
            size = f"{found.width} x {found.height} pixels, more than {most_pixels:,}"
            raise UserError(f"{name}: has {size}", "scale it down")
        found.load()  # whose errors are the image's
        return _upright(found).convert("RGB")
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes a decoder raise
        what = f"{name}: is not an image that can be read ({type(error).__name__})"
        raise UserError(what, f"give a file of {', '.join(formats)}") from None


def _upright(image: Any) -> Any:
    """Return a loaded image as its EXIF says that it was held, as transformers' load_image and datasets read it."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF of a sound image says nothing
        return image
    return image if turn is None else image.transpose(check_pillow("an image").Transpose[turn])


def digest_of(data: bytes) -> str:
    """Return the digest of a Picture, of its file's contents."""
    return hashlib.sha256(data).hexdigest()


def find_picture(path: str | Path, tokens: int) -> Picture:
    """Return the image in a file, which is decoded once to be sure of it. Raises UserError that names the file."""
    data = _read(path)
    decode_picture(data, _name(path), FORMATS, MOST_PIXELS)
    return Picture(str(path), digest_of(data), tokens)


def open_picture(picture: Picture) -> Any:
    """Return it as a PIL.Image in RGB. Raises UserError where the file is another one now, or cannot be read."""
    data = _read(picture.path)
    if digest_of(data) != picture.digest:
        raise UserError(
            f"{_name(picture.path)}: has changed since the rows were read",
            "put it back, or name another --data_cache, where the rows are read again",
        )
    return decode_picture(data, _name(picture.path), FORMATS, MOST_PIXELS)


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
        raise UserError(f"{_name(path)}: cannot be read ({why})", "correct the path") from None


def _name(path: str | Path) -> str:
    return f"image {str(path)!r}"
