"""A Hugging Face folder of random weights in the shape of a config.json, for peers that only load from a folder.

The layers share their bytes: one layer is drawn once and written under each layer's names, so that writing runs at the
disk's speed. `nf4` writes what bitsandbytes saves: four bits with doubly quantised scales, 36 GB for a 70B model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_enable_fp32_cpu_offload": False,
}
LAYER = re.compile(r"^(.*\.layers\.)(\d+)(\..*)$")
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}
Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def write_folder(folder: Path, fields: dict, base: str, device: torch.device) -> int:
    """Write a model, a configuration and a tokenizer into `folder`, and return their bytes.

    fields  of the config.json; its weights are named as transformers names them
    base    bf16, or nf4: linears of the layers quantised on `device` by bitsandbytes
    """
    prefix, count, first, outside = _split(_shapes_of(fields))
    make = _quantised if base == "nf4" else _dense
    layer = _serialise(make(first, device))
    rest = _serialise(_dense(outside, device))
    folder.mkdir(parents=True, exist_ok=True)
    files = {"model-rest.safetensors": (rest, "")}
    files |= {f"model-{i:03d}.safetensors": (layer, f"{prefix}{i}") for i in range(count)}
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda item: _write(folder / item[0], *item[1]), files.items()))
    weight_map = {start + name: file for file, (parts, start) in files.items() for name, *_ in parts}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    fields = fields | {"dtype": "bfloat16"} | ({"quantization_config": NF4} if base == "nf4" else {})
    (folder / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    write_tokenizer(folder, fields["vocab_size"])
    return sum(sizes)


def _shapes_of(fields: dict) -> Shapes:
    """Shapes of transformers' parameters by name; a head that is tied to the embedding is not among them."""
    import transformers

    config = transformers.CONFIG_MAPPING[fields["model_type"]](**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _split(shapes: Shapes) -> tuple[str, int, Shapes, Shapes]:
    """What precedes a layer's number, how many layers, the shapes of one by the rest of the name, those outside."""
    layers: dict[int, Shapes] = {}
    outside, prefixes = {}, set()
    for name, shape in shapes.items():
        if found := LAYER.match(name):
            prefixes.add(found[1])
            layers.setdefault(int(found[2]), {})[found[3]] = shape
        else:
            outside[name] = shape
    if len(prefixes) != 1 or any(layer != layers[0] for layer in layers.values()):
        raise ValueError("this writes models of one stack of equal layers; this config.json has others")
    return prefixes.pop(), len(layers), layers[0], outside


def _dense(shapes: Shapes, device: torch.device) -> Tensors:
    """bfloat16 weights as an untrained model has them, by name."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return drawn.normal_(std=0.02, generator=generator).cpu()

    return {name: draw(name, shape) for name, shape in shapes.items()}


def _quantised(shapes: Shapes, device: torch.device) -> Tensors:
    """The same with matrices in nf4, under the names that bitsandbytes gives the parts of a saved weight."""
    from bitsandbytes.functional import quantize_4bit

    found = {}
    for name, weight in _dense(shapes, device).items():
        if weight.dim() == 1:
            found[name] = weight
            continue
        packed, state = quantize_4bit(weight.to(device), blocksize=64, compress_statistics=True, quant_type="nf4")
        found[name] = packed.cpu()
        found |= {f"{name}.{part}": tensor.cpu() for part, tensor in state.as_dict(packed=True).items()}
    return found


def _serialise(tensors: Tensors) -> list[tuple[str, str, list[int], memoryview]]:
    """(name, safetensors' name of the dtype, shape, bytes) of each tensor."""
    return [
        (
            name,
            SAFETENSORS_NAMES[tensor.dtype],
            list(tensor.shape),
            memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()),
        )
        for name, tensor in tensors.items()
    ]


def _write(file: Path, parts: Sequence[tuple[str, str, list[int], memoryview]], prefix: str) -> int:
    """Write one safetensors file with `prefix` before each name, and return its bytes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, data in parts:
        header[prefix + name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        write_all(out.write, [len(text).to_bytes(8, "little"), text, *(data for *_, data in parts)])
    return 8 + len(text) + at


def write_all(write: Callable[[memoryview], int | None], pieces: Sequence[bytes | memoryview]) -> None:
    """Write each piece whole: one call of `write` takes two GiB at most."""
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            rest = rest[write(rest[: 1 << 30]) or 0 :]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of made-up words, as large as the vocabulary, so that no loader resizes or clears an embedding."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    vocab = special | {f"w{i}": i for i in range(len(special), vocab_size)}
    added = [
        {"id": i, "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for word, i in special.items()
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
