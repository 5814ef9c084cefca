"""What a checkpoint costs the training: adapters of an 8B model and their AdamW moments, saved beside steps.

    python benchmarks/checkpoint_stall.py --layers 32 --rank 16 --device cuda

A step here is matrix products and many small operations, so that a saving thread which holds the interpreter shows. The
table has, in milliseconds: the copy alone; `stall`, what the training thread spends in beginning a save; the median
step alone and while a save is under way; and beside them what the save would cost if training waited for it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalora.checkpoint.adapter.shards import save_adapter
from megalora.checkpoint.layout import Layout
from megalora.checkpoint.run.background import BackgroundSaves, HostCopy
from megalora.checkpoint.run.state import CheckpointWriter
from megalora.optimizer import MOMENTS
from megalora.parallel.split import Split
from megalora.training import steady_heap

LINEARS = {  # of Llama-3-8B: [out, in]
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def adapters(layers: int, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    shapes = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEARS.items():
            shapes[f"model.layers.{layer}.{name}.lora_A.weight"] = (rank, columns)
            shapes[f"model.layers.{layer}.{name}.lora_B.weight"] = (rows, rank)
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def stepper(device: torch.device, milliseconds: float) -> Callable[[], float]:
    """A function that runs one step of about that length and gives its seconds."""
    size = 4096 if device.type == "cuda" else 384
    a, small = torch.randn(size, size, device=device), torch.randn(64, device=device)
    products = 1

    def step() -> float:
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, a)
            for _ in range(20):
                small.mul(0.5)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        seconds = step()
    products = max(1, round(milliseconds / 1e3 / seconds))
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step_ms", type=float, default=100.0, help="length of a step, about")
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    tensors = adapters(arguments.layers, arguments.rank, device)
    moments = {name: {key: torch.rand_like(tensor) for key in MOMENTS} for name, tensor in tensors.items()}
    splits = {name: Split(tensor.shape) for name, tensor in tensors.items()}
    copies = HostCopy([tensor for tensor in tensors.values() for _ in range(3)])

    def take() -> tuple[dict, dict]:
        copies.start()
        return copies.take(tensors), {name: copies.take(state) for name, state in moments.items()}

    def snapshot() -> Callable[[Path], Path]:
        taken, states = take()

        def write(folder: Path) -> Path:
            copies.wait()
            return save_adapter(folder, taken, splits, Layout(), {"r": arguments.rank}, states, {})

        return write

    def copied() -> float:
        start = time.perf_counter()
        take()
        copies.wait()
        return time.perf_counter() - start

    step = stepper(device, arguments.step_ms)
    alone = statistics.median(step() for _ in range(20))
    copy = statistics.median([copied() for _ in range(5)])
    with steady_heap(), tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        writer = CheckpointWriter(folder, writes=True, is_main=True, gather=lambda v: [v], save_total_limit=2)
        saves = BackgroundSaves(writer)
        stalls, beside, totals = [], [], []
        for number in range(1, arguments.saves + 1):
            start = time.perf_counter()
            saves.start(number, snapshot, {})
            stalls.append(time.perf_counter() - start)
            while saves._thread.is_alive():
                beside.append(step())
            saves.wait()
            totals.append(saves.finished()[0].total)
        start = time.perf_counter()
        saves.start(arguments.saves + 1, snapshot, {})
        saves.wait()
        waited = time.perf_counter() - start

    megabytes = 3 * sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{where}: {arguments.layers} layers, rank {arguments.rank}: {megabytes:.0f} MB of adapters and moments")
    rows = {
        "copy alone": copy,
        "stall: beginning a save, median": statistics.median(stalls),
        "stall: beginning a save, worst": max(stalls),
        "step alone, median": alone,
        "step beside a save, median": statistics.median(beside),
        "step beside a save, worst": max(beside),
        "save, from beginning to tracker": statistics.median(totals),
        "save, were it waited for": waited,
    }
    for name, seconds in rows.items():
        print(f"  {name:34} {1e3 * seconds:10.1f} ms")


if __name__ == "__main__":
    main()
