"""`megalora convert` against cp of the same bytes, and its peak memory, on a generated model.

    python benchmarks/convert_speed.py [--gigabytes 8] [--folder build/convert_speed] [--keep]

Writes a model of the shape of Llama-8B with as many layers as fit, then times, one after another and each after a
sync: cp, to-shards (tensor 2 x pipeline 2), cp again, to-hf. A conversion fsyncs what it writes and cp does not, so cp
is given both as it is and with the sync after it. The times of conversions are those of whole processes. Needs three
times the size on the disk; removes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from megalora.checkpoint.base.streams import TensorType
from megalora.checkpoint.base.transfer import plan_hf, transfer
from megalora.models.config import config_from_dict

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
ENDS_GB, LAYER_GB = 2.10, 0.436


class Noise:
    """Base weights of random numbers: the same 16 MB again and again."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = shapes
        self._block = torch.randn(8 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def where(self, name: str) -> str:
        return "noise"

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def copy(self, name: str, index: tuple[slice, ...], out: torch.Tensor) -> None:
        flat, start = out.view(-1), hash(name) % 1000
        for place in range(0, flat.numel(), self._block.numel() - start):
            piece = flat[place : place + self._block.numel() - start]
            piece.copy_(self._block[start : start + piece.numel()])


def main() -> None:
    parser = argparse.ArgumentParser(description="megalora convert against cp")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/convert_speed")
    parser.add_argument("--keep", action="store_true", help="leave the generated model there for the next run")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    source, copy, shards, back = (folder / name for name in ("hf", "copy", "shards", "back"))
    try:
        if not source.exists():
            generate(source, max(1, round((arguments.gigabytes - ENDS_GB) / LAYER_GB)))
        nbytes = sum(file.stat().st_size for file in source.iterdir())
        largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 2
        print(f"{nbytes / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, {os.cpu_count()} cores", flush=True)

        convert = [sys.executable, ROOT / "tools/convert_hf.py"]
        for command, one, other, flags in (
            ("to-shards", source, shards, ["--tensor_parallel_size", "2", "--pipeline_parallel_size", "2"]),
            ("to-hf", shards, back, []),
        ):
            os.sync()
            plain, _ = timed("cp", "-r", "--reflink=never", source, copy)
            began = time.monotonic()
            os.sync()
            durable = plain + time.monotonic() - began
            shutil.rmtree(copy)
            os.sync()
            seconds, peak = timed(*convert, command, "--input", one, "--output", other, *flags)
            report("cp", nbytes, plain)
            report("cp and sync", nbytes, durable, plain)
            report(command, nbytes, seconds, plain, durable)
            allowed = 3 * largest + 500e6
            print(f"{'':12} peak memory {peak / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB", flush=True)
    finally:
        for made in (copy, shards, back):
            shutil.rmtree(made, ignore_errors=True)
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def generate(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    fields = SHAPE | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = config_from_dict(fields).tensors
    plan = plan_hf({name: TensorType(torch.bfloat16, shape) for name, shape in shapes.items()}, 5_000_000_000)
    transfer(Noise(shapes), plan, folder, lambda nbytes: None)


def timed(*command: object) -> tuple[float, int]:
    """Seconds and peak resident bytes (mapped files included) of a process that must succeed."""
    began = time.monotonic()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return time.monotonic() - began, usage.ru_maxrss * 1024


def report(what: str, nbytes: int, seconds: float, *against: float) -> None:
    names = ("cp", "cp and sync")
    ratios = "  ".join(f"{one / seconds:.2f} x {name}" for one, name in zip(against, names, strict=False))
    print(f"{what:12} {seconds:6.1f} s  {nbytes / seconds / 1e9:5.2f} GB/s  {ratios}", flush=True)


if __name__ == "__main__":
    main()
