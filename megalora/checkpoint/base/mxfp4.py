"""MXFP4 as gpt_oss is published in it: the experts of a layer in one tensor, 32 numbers of 4 bits to a scale of 8.

X_blocks  U8 [E, out, in / 32, 16]   two e2m1 numbers a byte, the first in the low half
X_scales  U8 [E, out, in / 32]       powers of two, 127 for 1 (e8m0)

X stands for the decoded tensor [E, in, out], as transformers has it: the inverse of how the codes lie. Source: OCP
Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

import torch

from megalora.checkpoint.base.hf import HfWeights
from megalora.errors import UserError

BLOCKS, SCALES = "_blocks", "_scales"
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1, without the sign in its highest bit
_BLOCK, _BYTES, _NOT_A_NUMBER = 32, 16, 255
_AGAIN = "download the model again, or take its unquantised checkpoint"


class Mxfp4:
    """A tensor of experts [E, in, out], decoded to bfloat16, which holds its numbers exactly.

    Raises UserError, naming file and tensor, for scales that are missing or misshapen.
    """

    dtype = torch.bfloat16

    def __init__(self, weights: HfWeights, stem: str):
        self.name, self._weights = stem, weights
        blocks, scales = stem + BLOCKS, stem + SCALES
        self.parts = {blocks, scales}
        shape, of_scales = weights.shapes[blocks], weights.shapes.get(scales)
        if of_scales is None:
            raise UserError(f"{weights.where(blocks)}: {blocks} is in 4 bits, but {scales} is missing", _AGAIN)
        good = len(shape) == 4 and shape[3] == _BYTES and of_scales == shape[:3] and weights.kind(scales) == "U8"
        if not good:
            raise UserError(
                f"{weights.where(blocks)}: {blocks} {list(shape)} and {scales} {list(of_scales)} in "
                f"{weights.kind(scales)} are no MXFP4 ([experts, out, in / 32, 16] and [experts, out, in / 32] in U8)",
                _AGAIN,
            )
        self.shape = (shape[0], shape[2] * _BLOCK, shape[1])

    def copy(self, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copy the decoded `tensor[index]` into `out` (its shape; any dtype and device), an expert at a time."""
        experts, rows, columns = index
        first, last = rows.start // _BLOCK, -(-rows.stop // _BLOCK)
        skipped = rows.start - first * _BLOCK
        for place, expert in enumerate(range(experts.start, experts.stop)):
            at = (slice(expert, expert + 1), columns, slice(first, last))
            size = 1, columns.stop - columns.start, last - first
            codes = torch.empty(*size, _BYTES, dtype=torch.uint8)
            scales = torch.empty(size, dtype=torch.uint8)
            self._weights.copy(self.name + BLOCKS, (*at, slice(0, _BYTES)), codes)
            self._weights.copy(self.name + SCALES, at, scales)
            if (scales == _NOT_A_NUMBER).any():
                where = self._weights.where(self.name + SCALES)
                raise UserError(f"{where}: {self.name}{SCALES} holds scales that are not finite", _AGAIN)
            decoded = decode_mxfp4(codes[0], scales[0]).to(self.dtype)
            out[place].copy_(decoded[:, skipped : skipped + rows.stop - rows.start].t())


def decode_mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the numbers [rows, 32 n] float32 of codes [rows, n, 16] and scales [rows, n], both uint8."""
    numbers = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)], dtype=torch.float32)
    halves = torch.stack([codes & 15, codes >> 4], -1).flatten(2)
    return torch.ldexp(numbers[halves.int()], scales.int().unsqueeze(-1) - 127).flatten(1)
