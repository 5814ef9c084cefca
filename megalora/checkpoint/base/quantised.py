"""Checkpoints that are quantised already: what their tensors mean, and how they are read by slice.

bitsandbytes, 4-bit    X.weight U8 [n / 2, 1]; .absmax, .quant_map and, quantised in turn, .nested_absmax,
                       .nested_quant_map; .quant_state.bitsandbytes__nf4, JSON in bytes
fp8 (DeepSeek, Qwen)   X.weight F8_E4M3 with X.weight_scale_inv, one scale a block of 128 x 128, or one in all
compressed-tensors     X.weight F8_E4M3 with X.weight_scale: one scale in all, one a row, or one a block
MXFP4 (gpt_oss)        X_blocks U8 with X_scales U8, see megalora.checkpoint.base.mxfp4

Each quantised weight stands here as one tensor of its decoded shape; linears that a checkpoint leaves in floating point
stand as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megalora.checkpoint.base.hf import HfWeights, is_hf
from megalora.checkpoint.base.mxfp4 import BLOCKS, Mxfp4
from megalora.errors import UserError
from megalora.files import read_json
from megalora.ops.fp8 import Fp8Rows, Fp8Weight
from megalora.ops.nf4 import NUMBERS, Absmax, Nf4Weight

_STATE = ".quant_state.bitsandbytes__"
_SCALES = ("_scale_inv", "_scale")
# Of the activations or the cache of an engine that serves the model: they do not change its weights.
_HARMLESS = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")
_AGAIN = "download the model again, or take its unquantised checkpoint"
_STATE_BYTES = 1 << 16  # of the settings of a weight; 300 in use
_FLOATS = ("F32", "BF16", "F16")  # how scales are stored
_STEP = 16 << 20  # bytes of codes that are decoded at a time


def is_quantised(weights: HfWeights) -> bool:
    """Return whether any tensor of the files is quantised, or belongs to one that is."""
    return any(
        weights.kind(name) in ("F8_E4M3", "U8")
        or _STATE in name
        or name.endswith(_HARMLESS)
        or _is_scale(name, weights)
        for name in weights.shapes
    )


def _is_scale(name: str, weights: HfWeights) -> bool:
    """Return whether a tensor is the scale of a weight: others end so too, as gemma4's router.per_expert_scale."""
    owners = (name.removesuffix(end) for end in _SCALES if name.endswith(end))
    return any(owner in weights.shapes or owner.endswith(".weight") for owner in owners)


def holds_quantised(folder: str | Path) -> bool:
    """Return whether a folder of base weights holds quantised ones. Raises UserError as HfWeights."""
    return is_hf(Path(folder)) and is_quantised(HfWeights(folder))


class QuantisedWeights:
    """The weights of an HF folder by their decoded shapes, some of them quantised.

    Raises UserError, naming file and tensor, where scales are missing, misshapen, not finite or of a kind that is not
    read.
    """

    def __init__(self, weights: HfWeights):
        self._weights = weights
        names = weights.shapes.keys()
        block = _block_size(weights.folder)
        self._quantised: dict[str, _Nf4 | _Fp8] = {}
        self._mxfp4: dict[str, Mxfp4] = {}
        parts: set[str] = set()
        for name in sorted(names):
            if _STATE in name:
                found: _Nf4 | _Fp8 = _Nf4(weights, *name.split(_STATE))
            elif weights.kind(name) == "F8_E4M3":
                found = _Fp8(weights, name, block)
            elif name.endswith(BLOCKS) and weights.kind(name) == "U8":
                stacked = Mxfp4(weights, name.removesuffix(BLOCKS))
                self._mxfp4[stacked.name] = stacked
                parts |= stacked.parts
                continue
            else:
                continue
            self._quantised[found.name] = found
            parts |= found.parts
        parts |= {name for name in names if name.endswith(_HARMLESS)}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(names - parts):
            if name in self._quantised:
                self.shapes[name] = self._quantised[name].shape
                continue
            self.shapes[name] = weights.shapes[name]
            self._refuse(name)
        self.shapes |= {name: stacked.shape for name, stacked in self._mxfp4.items()}

    def _refuse(self, name: str) -> None:
        """Raise UserError for a tensor that says that the files are quantised, but not how."""
        where, kind = self._weights.where(name), self._weights.kind(name)
        owner = next((name.removesuffix(end) for end in _SCALES if name.endswith(end)), None)
        if owner is not None and owner in self._weights.shapes:
            raise UserError(
                f"{where}: holds the scale {name}, but {owner} is {self._weights.kind(owner)}, not F8_E4M3", _AGAIN
            )
        if kind == "U8":
            raise UserError(f"{where}: {name} is in 4 bits, but {name}{_STATE}nf4 is missing", _AGAIN)

    def where(self, name: str) -> str:
        """Return the file that holds tensor `name`, for messages."""
        return self._weights.where(name + BLOCKS if name in self._mxfp4 else name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of tensor `name`, that in which it was quantised. Raises UserError as HfWeights."""
        if name in self._mxfp4:
            return Mxfp4.dtype
        found = self._quantised.get(name)
        return self._weights.dtype(name) if found is None else found.dtype

    def stored(self, name: str) -> Nf4Weight | Fp8Weight | None:
        """Return a quantised tensor as it is stored; None for any other, and for MXFP4, which is decoded."""
        found = self._quantised.get(name)
        return None if found is None else found.stored(0, found.shape[0])

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Copy the decoded `tensor[index]` into `out` (its shape; any dtype and device), some rows at a time."""
        if name in self._mxfp4:
            return self._mxfp4[name].copy(index, out)
        found = self._quantised.get(name)
        if found is None:
            return self._weights.copy(name, index, out)
        rows, columns = index
        step = max(1, _STEP // found.shape[1])
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            block = torch.empty(stop - start, columns.stop - columns.start, dtype=found.dtype)
            found.decode(start, stop, (columns.start, columns.stop), block)
            out[start - rows.start : stop - rows.start].copy_(block)
        return None


class _Nf4:
    """A weight of bitsandbytes."""

    def __init__(self, weights: HfWeights, name: str, kind: str):
        self.name, self._weights = name, weights
        if kind != "nf4":
            raise UserError(f"{weights.where(name + _STATE + kind)}: {name} is in {kind}, which is not read", _AGAIN)
        state = self._state()
        try:
            rows, columns = map(int, state["shape"])
            self.shape, self._block = (rows, columns), int(state["blocksize"])
            self.dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[
                state["dtype"]
            ]
            self._nested = int(state["nested_blocksize"]) if "nested_blocksize" in state else None
            self._offset = float(state.get("nested_offset", 0.0))
            numbers = rows, columns, self._block, 1 if self._nested is None else self._nested
            sound = min(numbers) > 0 and max(numbers) < 2**31 and math.isfinite(self._offset)
        except (KeyError, TypeError, ValueError, OverflowError):
            sound = False
        if not sound:
            raise UserError(f"{self.where}: {name}{_STATE}nf4 is damaged", _AGAIN)
        blocks = -(-rows * columns // self._block)
        sizes = {name: -(-rows * columns // 2), f"{name}.absmax": blocks, f"{name}.quant_map": len(NUMBERS)}
        if self._nested is not None:
            sizes |= {f"{name}.nested_absmax": -(-blocks // self._nested), f"{name}.nested_quant_map": 256}
        self.parts = {*sizes, f"{name}{_STATE}nf4"} - {name}
        for part, size in sizes.items():
            if part not in weights.shapes:
                raise UserError(f"{self.where}: lacks {part}, a scale of {name}", _AGAIN)
            if math.prod(weights.shapes[part]) != size:
                raise UserError(
                    f"{weights.where(part)}: {part} holds {math.prod(weights.shapes[part])} values, but {name} "
                    f"{list(self.shape)} in blocks of {self._block} has {size}",
                    _AGAIN,
                )
        kinds = ("U8",) if self._nested is not None else _FLOATS
        if weights.kind(f"{name}.absmax") not in kinds:
            found = weights.kind(f"{name}.absmax")
            raise UserError(f"{self.where}: {name}.absmax is stored as {found}, not as {' or '.join(kinds)}", _AGAIN)
        if not torch.allclose(weights.raw(f"{name}.quant_map").float().view(-1), torch.tensor(NUMBERS), atol=1e-6):
            raise UserError(f"{weights.where(name)}: {name}.quant_map is not that of NF4", _AGAIN)

    @property
    def where(self) -> str:
        return self._weights.where(self.name + _STATE + "nf4")

    def _state(self) -> Mapping[str, Any]:
        name, state = self.name + _STATE + "nf4", None
        if math.prod(self._weights.shapes[name]) <= _STATE_BYTES and self._weights.kind(name) == "U8":
            with contextlib.suppress(ValueError, RecursionError):
                state = json.loads(bytes(self._weights.raw(name).view(-1).tolist()))
        if not isinstance(state, dict):
            raise UserError(f"{self.where}: {name} is damaged", _AGAIN)
        return state

    def stored(self, start: int, stop: int) -> Nf4Weight:
        """Return the weight with the codes of rows [start, stop)."""
        absmax, raw, name = self._weights.raw(f"{self.name}.absmax").view(-1), self._weights.raw, self.name
        if self._nested is None:
            scales = Absmax(plain=_finite(absmax.float(), f"{name}.absmax", self.where))
        else:
            scale = _finite(raw(f"{name}.nested_absmax").float().view(-1), f"{name}.nested_absmax", self.where)
            numbers = _finite(raw(f"{name}.nested_quant_map").float().view(-1), f"{name}.nested_quant_map", self.where)
            scales = Absmax(absmax, scale, numbers, torch.tensor(self._offset), nested_block=self._nested)
        width = self.shape[1]
        if width % 2:  # rows begin inside of bytes
            start, stop = 0, self.shape[0]
        first, last = start * width // 2, -(-stop * width // 2)
        codes = torch.empty(last - first, *self._weights.shapes[name][1:], dtype=torch.uint8)
        rest = (slice(0, n) for n in codes.shape[1:])
        self._weights.copy(name, (slice(first, last), *rest), codes)
        return Nf4Weight(self.shape, codes.view(-1), scales, self._block, start)

    def decode(self, start: int, stop: int, columns: tuple[int, int], out: torch.Tensor) -> None:
        for part in self.stored(start, stop).rows([(start, stop)], columns):
            part.decode_(out)


class _Fp8:
    """A weight in e4m3 with its scale."""

    dtype = torch.bfloat16

    def __init__(self, weights: HfWeights, name: str, block: tuple[int, int]):
        self.name, self._weights = name, weights
        shape = weights.shapes[name]
        found = [name + end for end in _SCALES if name + end in weights.shapes]
        if len(found) != 1 or len(shape) != 2:
            what = f"has no scale ({name}{_SCALES[0]} or _scale)"
            if len(found) > 1:
                what = f"has the scales {found[0]} and {found[1]}"
            elif len(shape) != 2:
                what = "has not two dimensions: quantised weights are read one linear a tensor, and not stacked"
            raise UserError(f"{weights.where(name)}: {name} {list(shape)} in F8_E4M3 {what}", _AGAIN)
        (self._scale,) = found
        self.parts, self.shape = {self._scale}, (shape[0], shape[1])
        scales = weights.shapes[self._scale]
        blocks = -(-shape[0] // block[0]), -(-shape[1] // block[1])
        if math.prod(scales) == 1:
            self._grid, self._block = (1, 1), self.shape
        elif scales in ((shape[0],), (shape[0], 1)):
            self._grid, self._block = (shape[0], 1), (1, shape[1])
        elif scales == blocks:
            self._grid, self._block = blocks, block
        else:
            raise UserError(
                f"{weights.where(self._scale)}: {self._scale} has shape {list(scales)}, but {name} {list(shape)} in "
                f"blocks of {block[0]} x {block[1]} has {list(blocks)}",
                _AGAIN,
            )
        if weights.kind(self._scale) not in _FLOATS:
            kind = weights.kind(self._scale)
            raise UserError(f"{weights.where(self._scale)}: {self._scale} in {kind} is not read", _AGAIN)

    def _scales(self) -> torch.Tensor:
        raw = self._weights.raw(self._scale).float().view(self._grid)
        return _finite(raw, self._scale, self._weights.where(self._scale))

    def _codes(self, start: int, stop: int) -> torch.Tensor:
        codes = torch.empty(stop - start, self.shape[1], dtype=torch.float8_e4m3fn)
        self._weights.copy(self.name, (slice(start, stop), slice(0, self.shape[1])), codes)
        return codes

    def stored(self, start: int, stop: int) -> Fp8Weight:
        assert (start, stop) == (0, self.shape[0])
        return Fp8Weight(self._codes(start, stop), self._scales(), self._block)

    def decode(self, start: int, stop: int, columns: tuple[int, int], out: torch.Tensor) -> None:
        (left, right), (high, wide) = columns, self._block
        scale = self._scales()[torch.arange(start, stop) // high, left // wide : -(-right // wide)]
        Fp8Rows(self._codes(start, stop)[:, left:right], scale, wide, left % wide).decode_(out)


def _finite(scale: torch.Tensor, name: str, where: str) -> torch.Tensor:
    """Return `scale`. Raises UserError where it is not finite."""
    if not scale.isfinite().all():
        raise UserError(f"{where}: {name} holds scales that are not finite", _AGAIN)
    return scale


def _block_size(folder: Path) -> tuple[int, int]:
    """Return the size of the blocks that config.json beside the files says, by default 128 x 128."""
    file = folder / "config.json"
    fields = read_json(file, _AGAIN).get("quantization_config") if file.is_file() else None
    size = fields.get("weight_block_size") if isinstance(fields, dict) else None
    if isinstance(fields, dict) and isinstance(fields.get("config_groups"), dict):
        groups = [group.get("weights") for group in fields["config_groups"].values() if isinstance(group, dict)]
        size = next((w["block_structure"] for w in groups if isinstance(w, dict) and w.get("block_structure")), None)
    good = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    return (size[0], size[1]) if size is not None and good else (128, 128)
