"""Model folders whose weights are quantised as other tools write them."""

from __future__ import annotations

import json

import torch
from oracle import fields_of
from safetensors.torch import save_file

from megalora.building import base_names
from megalora.checkpoint.base.weights import open_base
from megalora.models.config import read_config
from megalora.ops.fp8 import E4M3
from megalora.ops.nf4 import NUMBERS, quantise_nf4

BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
CHANNEL = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj.weight"


def bitsandbytes(name: str, W: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that transformers saves of a Linear4bit with double quantisation."""
    weight = quantise_nf4(W)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(W.shape),
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": weight.absmax.offset.item(),
    }  # fmt: skip
    return {
        name: weight.codes.view(-1, 1),
        f"{name}.absmax": weight.absmax.codes,
        f"{name}.quant_map": torch.tensor(NUMBERS),
        f"{name}.nested_absmax": weight.absmax.scale,
        f"{name}.nested_quant_map": weight.absmax.numbers.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def fp8_blocks(name: str, W: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = -(-W.shape[0] // 32), -(-W.shape[1] // 32)
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) / 100 + 0.01
    return {name: W.clamp(-400, 400).mul(50).to(E4M3), f"{name}_scale_inv": scale}


def channels(name: str, W: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = (W.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    return {
        name: (W.float() / scale.float()).clamp(-448, 448).to(E4M3),
        f"{name}_scale": scale,
        f"{name[:-7]}.input_scale": torch.ones(1),
    }


def one_scale(name: str, W: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: (W * 100).to(E4M3), f"{name}_scale_inv": torch.tensor(0.01)}


KINDS = {
    "bitsandbytes": (bitsandbytes, BITSANDBYTES),
    "blocks": (fp8_blocks, FP8),
    "channels": (channels, CHANNEL),
    "one scale": (one_scale, FP8 | {"weight_block_size": None}),
}


def make(folder, kind: str = "bitsandbytes", dense: tuple[str, ...] = (), change=lambda tensors: None, **config):
    """A model folder quantised in one of KINDS, all linears of the layers but `dense`."""
    quantise, quantization = KINDS[kind]
    folder.mkdir(exist_ok=True)
    fields = fields_of("llama", hidden_size=128, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization | config}))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in read_config(folder).tensors.items():
        W = (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        quantised = name.endswith("proj.weight") and not any(part in name for part in dense)
        tensors |= quantise(name, W) if quantised else {name: W}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def decoded(folder, name: str) -> torch.Tensor:
    weights = open_base(folder, base_names(read_config(folder)))
    out = torch.empty(weights.shapes[name])
    weights.copy(name, tuple(slice(0, n) for n in out.shape), out)
    return out
