"""A frozen prefix: the vectors of images, which take the places of tokens before a text. Without gradient or dropout.

transformers' own classes compute them, in evaluation mode, one image at a time: the numbers of an image are the same
bits whatever stands beside it, on whatever layout. Every tensor-parallel rank of the first stage computes those that
its tokens are of; nothing is sent. What was computed is kept in host memory, by the contents of the image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from megalora.models import spec
from megalora.models.inputs import Placed
from megalora.models.names import hang
from megalora.parallel.placement import Placement
from megalora.pictures import Picture

# Vectors that a rank keeps in host memory, where nothing else is said: what was not asked for longest goes first.
KEPT_BYTES = 2 << 30

ReadPicture = Callable[[Picture], torch.Tensor]


class PrefixBlock:
    """vision_model, query_tokens, qformer and language_projection below `root`, and the vectors that they gave.

    read        returns the pixels [3, image_size, image_size] float32 of an image, as the tower reads them
    kept_bytes  of vectors, in host memory
    """

    def __init__(self, root: nn.Module, prefix: spec.ImagePrefix, place: Placement):
        self.spec, self._place = prefix, place
        self._parts = _Parts(prefix)
        wide = torch.promote_types(place.dtype, torch.float32)
        for name, module in self._parts.named_children():
            dtype = wide if prefix.is_wide(f"{name}.") else place.dtype
            module.to(dtype).to_empty(device=place.device)
            hang(root, name, module)
        self._parts.query_tokens = nn.Parameter(
            torch.empty_like(self._parts.query_tokens, device=place.device, dtype=wide)
        )
        root.register_parameter("query_tokens", self._parts.query_tokens)
        self._parts.requires_grad_(False).eval()
        self.read: ReadPicture | None = None
        self.kept_bytes = KEPT_BYTES
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def put(self, hidden: torch.Tensor, placed: Placed) -> torch.Tensor:
        """Return the words [T, width] of this rank's tokens with the vectors of images in their places."""
        if not placed.pictures:
            return hidden
        vectors = torch.cat([self.vectors(picture) for picture in placed.pictures])
        return hidden.index_put((placed.tokens,), vectors[placed.rows].to(hidden.dtype))

    def vectors(self, picture: Picture) -> torch.Tensor:
        """Return [tokens, width] of an image, in the compute dtype on the device.

        Raises UserError where its file cannot be read.
        """
        found = self._kept.pop(picture.digest, None)
        if found is None:
            assert self.read is not None, "Stage.read_pictures"
            found = self._computed(self.read(picture))
            self._bytes += found.nbytes
        self._kept[picture.digest] = found
        while self._bytes > self.kept_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found.to(self._place.device, non_blocking=True)

    def _computed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vectors of an image in host memory."""
        # Generation within a run is in inference mode, and what it computes is kept for training too.
        with torch.inference_mode(False), torch.no_grad():
            return self._parts(pixels.to(self._place.device)).cpu()


class _Parts(nn.Module):
    """The forward pass of transformers' Blip2Model.get_image_features, version 5."""

    def __init__(self, prefix: spec.ImagePrefix):
        from transformers import Blip2QFormerConfig, Blip2VisionConfig
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel

        super().__init__()
        vision, qformer = Blip2VisionConfig(**asdict(prefix.vision)), Blip2QFormerConfig(**asdict(prefix.qformer))
        with torch.device("meta"):
            self.vision_model = Blip2VisionModel._from_config(vision)
            self.qformer = Blip2QFormerModel._from_config(qformer)
            self.language_projection = nn.Linear(prefix.qformer.hidden_size, prefix.out_features)
            self.query_tokens = nn.Parameter(torch.empty(1, prefix.tokens, prefix.qformer.hidden_size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [tokens, out_features] of the pixels [3, image_size, image_size] of one image."""
        image = self.vision_model(pixel_values=pixels.unsqueeze(0), return_dict=True).last_hidden_state
        mask = torch.ones(image.shape[:-1], dtype=torch.long, device=image.device)
        found: Any = self.qformer(
            query_embeds=self.query_tokens, encoder_hidden_states=image, encoder_attention_mask=mask, return_dict=True
        )
        return self.language_projection(found.last_hidden_state.to(image.dtype))[0]
