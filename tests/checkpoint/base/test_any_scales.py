"""Quantised weights made up by somebody: read, or an error of ours, whatever their scales and their settings are."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from fuzz import JSON, edited, examples, ours_only
from hypothesis import given
from hypothesis import strategies as st
from quantised import BITSANDBYTES, CHANNEL, FP8, bitsandbytes, channels, fp8_blocks, one_scale
from safetensors.torch import save_file

from megalora.checkpoint.base.hf import SINGLE, HfWeights
from megalora.checkpoint.base.quantised import QuantisedWeights
from megalora.errors import UserError
from megalora.models.quantisation import stored_format

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
KINDS = {
    "bitsandbytes": (bitsandbytes, BITSANDBYTES),
    "blocks": (fp8_blocks, FP8),
    "channels": (channels, CHANNEL),
    "one scale": (one_scale, FP8),
    "mxfp4": (lambda name, W: mxfp4(), {"quant_method": "mxfp4"}),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.int8, torch.float8_e4m3fn]


def mxfp4() -> dict[str, torch.Tensor]:
    stem = "model.layers.0.mlp.experts.up_proj"
    return {
        f"{stem}_blocks": torch.full((2, 3, 2, 16), 18, dtype=torch.uint8),
        f"{stem}_scales": torch.full((2, 3, 2), 120, dtype=torch.uint8),
    }


def sound(kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    quantise, config = KINDS[kind]
    W = torch.linspace(-1, 1, 70 * 66).view(70, 66).bfloat16()
    return quantise(NAME, W), {"quantization_config": config}


SOUND = {kind: sound(kind) for kind in KINDS}


def read(folder) -> None:
    """Every tensor that the folder says it has, whole and a slice of it, and as it is stored."""
    raw = json.loads((folder / "config.json").read_text())
    if isinstance(raw, dict):
        stored_format(raw, "config.json")
    weights = QuantisedWeights(HfWeights(folder))
    for name, shape in weights.shapes.items():
        for index in (tuple(slice(0, n) for n in shape), tuple(slice(n // 3, n - n // 3) for n in shape)):
            out = torch.empty([part.stop - part.start for part in index], dtype=weights.dtype(name))
            if out.dim() and out.numel():
                weights.copy(name, index, out)
        weights.stored(name)


@st.composite
def another(draw, tensor: torch.Tensor) -> torch.Tensor:
    """Of another dtype, shape or size; or with other values."""
    what = draw(st.sampled_from(["dtype", "shape", "rows", "values", "bytes"]))
    if what == "dtype":
        return tensor.to(draw(st.sampled_from(DTYPES)))
    if what == "shape":
        sizes = draw(st.lists(st.integers(1, 4), max_size=3))
        count = math.prod(sizes)
        return tensor.reshape(*sizes, tensor.numel() // count) if tensor.numel() % count == 0 else tensor.reshape(-1)
    if what == "rows":
        return tensor.reshape(-1)[: draw(st.integers(0, 3)) or tensor.numel() // 2].clone()
    if what == "values" and tensor.dtype.is_floating_point:
        value = draw(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e38]))
        return torch.full_like(tensor.float(), value).to(tensor.dtype)
    data = bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for _ in range(draw(st.integers(1, 4)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape) if data else tensor


def write(folder, tensors, config) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_the_sound_ones_are_read(tmp_path, kind):
    write(tmp_path / "any", *SOUND[kind])
    read(tmp_path / "any")


@examples(60)
@given(data=st.data())
def test_any_scales(tmp_path, data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    tensors, config = SOUND[kind][0].copy(), SOUND[kind][1]
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        change = data.draw(st.sampled_from(["drop", "move", "change", "change", "change"]))
        if change == "change":
            tensors[name] = data.draw(another(tensors[name]))
        else:
            ends = ["_scale", "_scale_inv", "_blocks", "_scales", ".absmax", ".quant_state.bitsandbytes__fp4"]
            tensor = tensors[name] if change == "move" or len(tensors) == 1 else tensors.pop(name)
            tensors |= {} if change == "drop" else {NAME + data.draw(st.sampled_from(ends)): tensor.clone()}
    if data.draw(st.booleans()):
        config = data.draw(edited(config))
    write(tmp_path / "any", tensors, config)
    ours_only(lambda: read(tmp_path / "any"))


def test_codes_of_scales_in_floats(tmp_path):
    """A NaN among them would be a place in the table of numbers."""
    tensors, config = SOUND["bitsandbytes"]
    name = NAME + ".absmax"
    write(tmp_path / "any", tensors | {name: tensors[name].float() * float("nan")}, config)
    with pytest.raises(UserError, match="absmax is stored as F32, not as U8"):
        read(tmp_path / "any")


def test_as_many_blocks_as_a_nested_one_has(tmp_path):
    """Rows of 66 values count three blocks each, the last row one more than there is: not of the next nested block."""
    tensors, config = SOUND["bitsandbytes"]
    state = json.loads(bytes(tensors[STATE].tolist())) | {"nested_blocksize": 73}
    assert tensors[NAME + ".absmax"].numel() == 73
    body = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    write(tmp_path / "any", tensors | {STATE: body}, config)
    read(tmp_path / "any")


@examples(60)
@given(data=st.data())
def test_any_state_of_bitsandbytes(tmp_path, data):
    tensors, config = SOUND["bitsandbytes"]
    state = json.loads(bytes(tensors[STATE].tolist()))
    sizes = [2**31, 2**62, 2**64, 10**400, [70, 66], [66, 70], [1, 4620]]
    values = JSON | st.integers(-2, 5000) | st.sampled_from(sizes)
    state |= data.draw(st.dictionaries(st.sampled_from(sorted(state)), values, max_size=3))
    text = json.dumps(data.draw(st.just(state) | edited(state))).encode() or b" "
    text = data.draw(st.just(text) | st.binary(min_size=1, max_size=30) | st.just(b"[" * 50_000))
    write(tmp_path / "any", tensors | {STATE: torch.tensor(list(text), dtype=torch.uint8)}, config)
    ours_only(lambda: read(tmp_path / "any"))
