"""quantization_config of a config.json: how the linears of a checkpoint are quantised, or why it cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalora.errors import UserError

_REMEDY = "take the model's unquantised checkpoint, which --base_format nf4 or fp8 quantises as it is loaded"


def stored_format(raw: Mapping[str, Any], where: str) -> str:
    """Return the format of the linears in the files of a config.json: "nf4", "fp8", or "dense", also where only the
    experts of MXFP4 are quantised, which are decoded.

    Raises UserError for a way of quantising that is not read.
    """
    fields = raw.get("quantization_config") or raw.get("compression_config")
    if fields is None:
        return "dense"
    if not isinstance(fields, Mapping):
        raise UserError(
            f"{where}: quantization_config is not an object", "take config.json from the model's own folder"
        )
    method = fields.get("quant_method")
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        method = "bitsandbytes"  # early files do not name it
    if method == "mxfp4":
        return "dense"
    readers = {"bitsandbytes": _bitsandbytes, "fp8": _fp8, "compressed-tensors": _compressed_tensors}
    if not isinstance(method, str) or method not in readers:
        known = "bitsandbytes, fp8, mxfp4 and compressed-tensors"
        raise _refused(where, f"quant_method = {method!r} is not read ({known} are)")
    return readers[method](fields, where)


def _bitsandbytes(fields: Mapping[str, Any], where: str) -> str:
    if fields.get("load_in_8bit") or not fields.get("load_in_4bit"):
        raise _refused(where, "bitsandbytes' 8-bit format is not read (its 4-bit format is)")
    kind = fields.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise _refused(where, f"bnb_4bit_quant_type = {kind!r} is not read (nf4 is)")
    return "nf4"


def _fp8(fields: Mapping[str, Any], where: str) -> str:
    kind = fields.get("fmt", "e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise _refused(where, f"fmt = {kind!r} is not read (e4m3 is)")
    block = fields.get("weight_block_size")
    good = block is None or (
        isinstance(block, (list, tuple)) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    )
    if not good:
        raise _refused(where, f"weight_block_size = {block!r} is not two positive sizes")
    return "fp8"


def _compressed_tensors(fields: Mapping[str, Any], where: str) -> str:
    groups = fields.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    for group in groups:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        weights = weights if isinstance(weights, Mapping) else {}
        kind = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
        if kind[:2] != ("float", 8) or kind[2] not in ("tensor", "channel", "block"):
            said = f"weights of type {kind[0]}, {kind[1]} bits, a scale a {kind[2]}"
            raise _refused(where, f"{said} are not read (float, 8 bits, a scale a tensor, channel or block are)")
    if not groups:
        raise _refused(where, f"format = {fields.get('format')!r} without config_groups is not read")
    return "fp8"


def _refused(where: str, what: str) -> UserError:
    return UserError(f"{where}: quantization_config: {what}", _REMEDY)
