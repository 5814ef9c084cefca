"""Pixels: an image file -> what a vision tower reads, by transformers' own processor. No code of the model's folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UserError
from ..pictures import Picture, open_picture

_KINDS = ("BlipImageProcessor", "BlipImageProcessorFast", "BlipImageProcessorPil")
_READ = frozenset(
    "do_resize size resample do_rescale rescale_factor do_normalize image_mean image_std do_convert_rgb".split()
)
_NO_EFFECT = frozenset(  # or of other kinds of images, where they say nothing
    "image_processor_type feature_extractor_type processor_class data_format input_data_format device return_tensors "
    "default_to_square size_divisor backend num_query_tokens".split()
)


class PixelReader:
    """Reads the pixels of images as the processor in a model's folder makes them, with pillow.

    fields  those of the processor; size: of the image that the tower reads, which they must agree with
    Raises UserError, naming `where`, for a processor that is not implemented.
    """

    def __init__(self, fields: Mapping[str, Any], size: int, where: str):
        kind = fields.get("image_processor_type", _KINDS[0])
        if kind not in _KINDS:
            raise UserError(
                f"{where}: image_processor_type = {kind!r} is not implemented", f"take a model with {_KINDS[0]}"
            )
        for name, value in fields.items():
            if name not in _READ | _NO_EFFECT and not (value is None or value is False or value in ("", [], {})):
                raise UserError(
                    f"{where}: field {name!r} = {value!r:.200} of the image processor is not read",
                    "remove it if it does not change the pixels",
                )
        self._where, self._size = where, size
        try:
            self._processor = _processor()(**{name: fields[name] for name in _READ & fields.keys()})
        except Exception as error:  # what transformers says to values that are none
            raise UserError(
                f"{where}: transformers cannot use its image processor ({error!s:.200})", "correct the field"
            ) from None

    def __call__(self, picture: Picture) -> torch.Tensor:
        """Return [3, size, size] float32. Raises UserError where the file cannot be read, or gives another size."""
        return self.pixels(open_picture(picture), picture.path)

    def pixels(self, image: Any, name: str) -> torch.Tensor:
        """Return [3, size, size] float32 of a PIL.Image. name: in errors. Raises UserError for another size."""
        found = self._processor(image, return_tensors="pt")["pixel_values"][0]
        if tuple(found.shape) != (3, self._size, self._size):
            raise UserError(
                f"{self._where}: the image processor makes pixels {list(found.shape)} of {name}, and the "
                f"model's image_size is {self._size}",
                f'set size to {{"height": {self._size}, "width": {self._size}}} and do_resize to true',
            )
        return found


def _processor() -> Any:
    try:
        return importlib.import_module("transformers.models.blip.image_processing_pil_blip").BlipImageProcessorPil
    except ImportError:  # before version 5 there was one, of pillow
        return importlib.import_module("transformers.models.blip.image_processing_blip").BlipImageProcessor
