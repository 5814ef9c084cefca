"""Layers of experts on one GPU: the grouped products alone, and steps of a slice, in the shape of a config.json.

    python benchmarks/experts.py                      # Qwen3-30B-A3B's shape, 4096 tokens, all linears and experts r 16
    python benchmarks/experts.py --layers 2 6 --seq_length 2048 --profile

Products: the three products of gate up, and of down, forward and backward, over uneven groups of rows, against one
dense product of the same FLOPs. Steps: those of two depths; their difference is the time of a layer, from which the
whole model's tokens a second follow (all layers and what the embedding, head and optimizer take beside them).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from common import add_machine, machine, where_of
from train_step import Step, ours

from megalora.choices import BASE_FORMATS
from megalora.ops.grouped import BranchGrad, grouped, grouped_branch_, grouped_nt, grouped_outer_

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip
REPEATS = 20


def seconds(work, device: torch.device, repeats: int = REPEATS) -> float:
    """Return the median time of `work`, in seconds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    found = []
    for _ in range(repeats + 3):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[3:])


def kernel_seconds(work, device: torch.device) -> float:
    """Return the median time of `work` without the host's part: on a GPU it is replayed from a graph."""
    if device.type != "cuda":
        return seconds(work, device)
    work()
    graph, calls = torch.cuda.CUDAGraph(), 8
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    return seconds(graph.replay, device) / calls


def products(fields: dict, tokens: int, rank: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, float]]:
    """Return (name, share of the rate of a dense product) of each grouped product of a layer."""
    experts, hidden, inner = fields["num_experts"], fields["hidden_size"], fields["moe_intermediate_size"]
    rows = tokens * fields["num_experts_per_tok"]
    torch.manual_seed(0)
    counts = torch.multinomial(torch.rand(experts) + 0.5, rows, replacement=True).bincount(minlength=experts)
    ends = counts.cumsum(0)
    bounds = ends.to(device, torch.int32) if device.type == "cuda" else tuple(ends.tolist())
    room = 64 if device.type == "cuda" else 8
    found = []
    for name, inputs, outputs in (("gate up", hidden, 2 * inner), ("down", inner, hidden)):
        sizes = outputs, inputs, room, rank
        found += [(f"{name}: {part}", figure) for part, figure in of_linears(sizes, bounds, rows, device, dtype)]
    return found


def of_linears(sizes, bounds, rows: int, device: torch.device, dtype: torch.dtype) -> list[tuple[str, float]]:
    """Return (part, share or microseconds) of one group's products; sizes: outputs, inputs, room, rank."""
    outputs, inputs, room, rank = sizes

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * 0.02

    def share(dense, ours) -> float:
        return kernel_seconds(dense, device) / kernel_seconds(ours, device)

    X, P, dy = random(rows, inputs + room), random(len(bounds), outputs, inputs + room), random(rows, outputs)
    A, z, one, x = random(len(bounds), rank, inputs), random(rows, rank), P[0].contiguous(), X[:, :inputs]
    W, W_one, B = P[:, :, :inputs], one[:, :inputs].contiguous(), P[:, :, inputs : inputs + rank]
    dA, dB = torch.zeros(A.shape, device=device), torch.zeros(len(bounds), outputs, rank, device=device)
    whole = [BranchGrad(dB, slice(0, outputs), slice(0, rank), 2.0)]
    times = {
        "dense forward": lambda: X @ one.t(),
        "z": lambda: grouped_nt(x, A, bounds),
        "dz": lambda: grouped(dy, B, bounds),
        "dA": lambda: grouped_outer_([dA], z, x, bounds),
        "dB": lambda: grouped_outer_([dB], dy, z, bounds, 2.0),
        "dz and dB": lambda: grouped_branch_(whole, dy, z, B, bounds),
    }
    return [
        ("forward", share(lambda: X @ one.t(), lambda: grouped_nt(X, P, bounds))),
        ("dx", share(lambda: dy @ W_one, lambda: grouped(dy, W, bounds))),
        ("dx + dz A", share(lambda: dy @ W_one, lambda: grouped(dy, W, bounds, z, A))),
        *[(f"{part}, us", 1e6 * kernel_seconds(work, device)) for part, work in times.items()],
    ]


def step_seconds(fields: dict, layers: int, options, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return (seconds of a training step of so many layers, GiB held at most)."""
    fields = fields | {"num_hidden_layers": layers}
    lora = {
        "r": options.r,
        "lora_alpha": 2 * options.r,
        "lora_dropout": options.dropout,
        "target_modules": "all-linear",
    }
    data = Step(options.rows, options.seq_length, fields["vocab_size"], False, device)
    step = ours(None, fields, lora, data, dtype, options, options.base_format)
    found = seconds(step, device, options.steps)
    if options.profile and device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70))
    held = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return found, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="config.json (default: the shape of Qwen3-30B-A3B)")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 6])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seq_length", type=int, default=4096)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--base_format", choices=BASE_FORMATS, default="dense", help="of the steps")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--cuda_graphs", type=lambda word: {"true": True, "false": False}[word])
    add_machine(parser)
    options = parser.parse_args()
    device, dtype = machine(options)
    fields = QWEN3_30B_A3B if options.model is None else json.loads(options.model.read_text())
    tokens = options.rows * options.seq_length
    print(f"{where_of(device)}, {dtype}, {tokens} tokens, r {options.r}")
    for name, share in products(fields, tokens, options.r, device, dtype):
        print(f"  {name:28} {share:9.2f}")
    few, many = options.layers
    (short, _), (long, held) = (step_seconds(fields, n, options, device, dtype) for n in (few, many))
    layer = (long - short) / (many - few)
    whole = short + (fields["num_hidden_layers"] - few) * layer
    steps = f"steps of {few} and {many} layers {1e3 * short:.1f} and {1e3 * long:.1f} ms"
    print(f"  a layer {1e3 * layer:.2f} ms; {steps}, {held:.1f} GiB")
    print(f"  {fields['num_hidden_layers']} layers: {whole:.3f} s a step, {tokens / whole:.0f} tokens a second")


if __name__ == "__main__":
    main()
