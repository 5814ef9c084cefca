"""Images of requests: a part of a message with a data URL -> the pixels that the model's vision tower reads.

Nothing is fetched and no file is read: a request brings its image with it. An image is decoded once, by rank 0 beside
the replica, and its pixels go to every rank with the prompt.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megalora.data.images import MARK, marked
from megalora.data.pixels import PixelReader
from megalora.errors import UserError
from megalora.models.prefix import ImagePrefix
from megalora.pictures import Picture, check_pillow, decode_picture, digest_of
from megalora.serving.errors import bad

PART = "image_url"  # the type of a part
MEDIA = {"image/gif": "GIF", "image/jpeg": "JPEG", "image/jpg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
FORMATS = tuple(dict.fromkeys(MEDIA.values()))  # fewer than of files: each has a decoder that strangers can reach
MOST_PIXELS = 1 << 25
KEPT_BYTES = 1 << 28  # of vectors, on each rank: those of images that were asked about lately
_EXAMPLE = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'


@dataclass(frozen=True)
class SentPicture(Picture):
    """An image that came with a request. pixels: [3, image_size, image_size] float32, as the tower reads them."""

    pixels: torch.Tensor = field(compare=False, repr=False)


def pixels_of(picture: Picture) -> torch.Tensor:
    """Return the pixels that a SentPicture brings, on every rank."""
    assert isinstance(picture, SentPicture)
    return picture.pixels


class ImageInput:
    """Reads the images of requests for a model that has one before each text. For rank 0.

    Raises UserError where pillow is not installed.
    """

    def __init__(self, prefix: ImagePrefix, reader: PixelReader):
        check_pillow("a model that reads images")
        self._prefix, self._reader = prefix, reader

    @property
    def placeholders(self) -> list[int]:
        """The token ids whose places an image takes."""
        return [self._prefix.placeholder] * self._prefix.tokens

    def read(self, url: str) -> SentPicture:
        """Return the image of a data URL. Slow: it is decoded. Raises ApiError for anything else."""
        data = _bytes_of(url)
        try:
            image = decode_picture(data, "the image", FORMATS, MOST_PIXELS)
            pixels = self._reader.pixels(image, "the image")
        except UserError as error:
            raise bad(str(error), "messages") from None
        return SentPicture("", digest_of(data), self._prefix.tokens, pixels)


def take_image(messages: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """Return (the user's only message with its text alone, the URL of its image). Raises ApiError for all else."""
    if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != "user":
        raise bad(
            "this model reads an image and a text, and does not chat: send one message of the user alone", "messages"
        )
    (message,) = messages
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    found = [part for part in parts if isinstance(part, dict) and part.get("type") == PART]
    if not found:
        raise bad(f"messages[0] has no image, and this model reads one before each text: add {_EXAMPLE}", "messages")
    if len(found) > 1:
        raise bad(f"messages[0] has {len(found)} images, and this model reads one: leave the others out", "messages")
    rest = [part for part in parts if part is not found[0] and part != {"type": "text", "text": ""}]
    if marked(rest):
        what = f"messages[0] has {MARK} in its text, and the image stands before the text in any case: take it out"
        raise bad(what, "messages")
    return {**message, "content": rest}, _url_of(found[0])


def _url_of(part: dict[str, Any]) -> str:
    """Return the URL of a part, all fields of which are read or refused."""
    inner = part.get(PART)
    if part.keys() != {"type", PART} or not isinstance(inner, dict) or not isinstance(inner.get("url"), str):
        raise bad(f"messages[0] has an image that is not written as {_EXAMPLE}", "messages")
    for name, value in inner.items():
        if name != "url" and not (value is None or (name, value) == ("detail", "auto")):
            what = f"messages[0] has {name[:40]!r} beside the url of its image, which has no effect here"
            raise bad(f"{what}: leave it out", "messages")
    return inner["url"]


def _bytes_of(url: str) -> bytes:
    """Return what a data URL holds. Raises ApiError for another URL, for one that is damaged, and for other media."""
    if url[:5].lower() != "data:":
        raise bad(
            f"the image is given as {url!r:.60}: this server fetches nothing and reads no files; send the image itself "
            "as a data URL (data:image/png;base64,...)",
            "messages",
        )
    head, comma, data = url[5:].partition(",")
    media, *parameters = (word.strip().lower() for word in head.split(";")) if comma else ("",)
    if media not in MEDIA:
        known = ", ".join(kind for kind in MEDIA if kind != "image/jpg")
        raise bad(f"the data URL of the image says {head!r:.40} before its data: send one of {known}", "messages")
    if parameters[-1:] != ["base64"]:
        raise bad("the data URL of the image is not in base64: write data:image/png;base64,...", "messages")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(f"the data URL of the image is not base64 ({error!s:.80}): encode it again", "messages") from None
