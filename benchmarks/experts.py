"""Layers of experts on one GPU: the grouped products alone, and steps of a slice, in the shape of a config.json.

    python benchmarks/experts.py                      # Qwen3-30B-A3B's shape, 4096 tokens, all linears and experts r 16
    python benchmarks/experts.py --layers 2 6 --seq_length 2048 --profile
    python benchmarks/experts.py --layers 1 4 --seq_length 8192 --share    # LoRA and dispatch, of the products' time

Alone: the products of gate up, and of down, forward and backward, over uneven groups of rows, against one dense product
of the same FLOPs; what else experts' adapters and dispatch run in a step; both of these as a share of the products'
time. --share: the same of a step's profile, by the names of kernels. Steps: those of two depths; their difference is
the time of a layer, from which the whole model's tokens a second follow (all layers and what the embedding, head and
optimizer take beside them).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import add_machine, machine, where_of
from train_step import Step, ours

from megalora.choices import BASE_FORMATS
from megalora.ops.dispatched import AtTokens, branch_, dispatch_nt, gate_nt, outer_
from megalora.ops.grouped import BranchGrad, grouped, grouped_nt
from megalora.ops.lora_linear import room_for
from megalora.ops.routing import Routes, combine, route
from megalora.ops.weighted_gate import SILU

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip
REPEATS = 20
Work = Callable[[], object]
# Kernels of megalora.ops by their names in a profile.
PRODUCTS = ("wide_kernel",)
BESIDE = (
    "dispatch_thin_kernel", "dispatch_kernel", "combine_kernel", "thin_kernel", "branch_kernel", "sum_kernel",
    "outer_kernel",
)  # fmt: skip
OTHERS = "gate_kernel", "gate_thin_kernel", "gate_backward_kernel", "count_kernel", "order_kernel"


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


def routes_of(fields: dict, tokens: int, device: torch.device, dtype: torch.dtype) -> Routes:
    """Return the routes of tokens to experts, some of which are chosen three times as often as others."""
    torch.manual_seed(0)
    wanted = (torch.rand(fields["num_experts"]) + 0.5).expand(tokens, -1)
    chosen = torch.multinomial(wanted, fields["num_experts_per_tok"]).to(device)
    return route(chosen, 0, fields["num_experts"], dtype)


class Group:
    """A layer's gate and up, or down, of all experts, with the operands of a step.

    sizes  inputs and outputs of the group, and how many linears it has
    """

    def __init__(
        self, name: str, sizes: tuple[int, int, int], routes: Routes, experts: int, r: int, dtype: torch.dtype
    ):
        self.name, self.routes, self.bounds, device = name, routes, routes.bounds, routes.pair.device
        (self.inputs, outputs, linears), rows = sizes, len(routes.pair)
        ranks = linears * r

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype) * 0.02

        self.room = room_for(ranks, device.type)
        self.X, self.P = random(rows, self.inputs + self.room), random(experts, outputs, self.inputs + self.room)
        self.x, self.W = self.X[:, : self.inputs], self.P[:, :, : self.inputs]
        self.dy, self.z, self.A = random(rows, outputs), random(rows, ranks), random(experts, ranks, self.inputs)
        self.B = self.P[:, :, self.inputs : self.inputs + ranks]
        self.token, self.dtoken = random(routes.tokens, self.inputs), random(routes.tokens, outputs)
        self.dA = [torch.zeros(experts, r, self.inputs, device=device) for _ in range(linears)]
        self.dB = []
        for i in range(linears):
            part, out = outputs // linears, torch.zeros(experts, outputs // linears, r, device=device)
            self.dB.append(BranchGrad(out, slice(i * part, (i + 1) * part), slice(i * r, (i + 1) * r), 2.0))

    def products(self) -> dict[str, Work]:
        return {
            "forward": lambda: grouped_nt(self.X, self.P, self.bounds),
            "dx + dz A": lambda: grouped(self.dy, self.W, self.bounds, self.z, self.A),
        }

    def dense(self) -> dict[str, Work]:
        """Products of as many FLOPs, of one matrix for all rows."""
        whole = self.P[0].contiguous()
        frozen = whole[:, : self.inputs].contiguous()
        return {"forward": lambda: self.X @ whole.t(), "dx + dz A": lambda: self.dy @ frozen}

    def beside(self) -> dict[str, Work]:
        """LoRA and dispatch: gate and up read tokens, and down's dy is that of tokens."""
        if self.name == "gate up":
            return {
                "dispatch, z": lambda: dispatch_nt(self.token, self.A, self.routes, self.room),
                "dz, dB": lambda: branch_(self.dB, self.dy, self.z, self.B, self.bounds),
                "dA": lambda: outer_(self.dA, self.z, AtTokens(self.token, self.routes), self.bounds),
                "sum of dx over pairs": lambda: combine(self.x, self.routes),
            }
        dy = AtTokens(self.dtoken, self.routes)
        return {
            "dispatch, dz, dB": lambda: branch_(self.dB, dy, self.z, self.B, self.bounds),
            "dA": lambda: outer_(self.dA, self.z, self.x, self.bounds),
            "sum over pairs": lambda: combine(self.dy, self.routes),
        }

    def gates(self) -> tuple[Work, Work]:
        """The gate alone, and with z of down: what it makes is down's input."""
        routes, gate_up = self.routes, torch.randn_like(self.X.new_empty(len(self.X), 2 * self.inputs))
        weights = torch.ones(routes.tokens, routes.choices, device=gate_up.device)
        return (
            lambda: SILU.forward(gate_up, weights, routes, self.room),
            lambda: gate_nt(SILU, gate_up, weights, self.A, routes, self.room),
        )


def kernels_alone(fields: dict, tokens: int, r: int, device: torch.device, dtype: torch.dtype) -> float:
    """Print what a layer's experts run in a step, each alone, and LoRA and dispatch as a share of the products.

    Return what z of down adds to the gate, in whose kernel it is, in seconds.
    """
    hidden, inner, experts = (fields[key] for key in ("hidden_size", "moe_intermediate_size", "num_experts"))
    routes, products, beside = routes_of(fields, tokens, device, dtype), 0.0, 0.0
    for name, sizes in (("gate up", (hidden, 2 * inner, 2)), ("down", (inner, hidden, 1))):
        group = Group(name, sizes, routes, experts, r, dtype)
        dense = group.dense()
        for part, work in group.products().items():
            taken = kernel_seconds(work, device)
            products += taken
            share = kernel_seconds(dense[part], device) / taken
            print(f"  {name + ': ' + part:30} {1e6 * taken:9.1f} us, {share:.2f} of a dense product's rate")
        for part, work in group.beside().items():
            taken = kernel_seconds(work, device)
            beside += taken
            print(f"  {name + ': ' + part:30} {1e6 * taken:9.1f} us")
    gate, with_z = (kernel_seconds(work, device) for work in group.gates())
    print(f"  {'gate':30} {1e6 * gate:9.1f} us, with z of down {1e6 * with_z:.1f}")
    told_share("kernels alone", beside + with_z - gate, products)
    return with_z - gate


def told_share(name: str, beside: float, products: float) -> None:
    """Print LoRA and dispatch as a share of the products: seconds of a layer."""
    times = f"{1e6 * beside:.0f} us of the products' {1e6 * products:.0f}"
    print(f"  LoRA and dispatch, {name}: {times}, {beside / products:.3f}")


def of_profile(profile: torch.profiler.profile, layers: int, z_of_down: float) -> None:
    """Print what kernels of experts take in a layer, by their names, and LoRA and dispatch as a share of products.

    z_of_down  seconds of a layer that it adds to gate_thin_kernel
    """
    taken = {event.key: (event.self_device_time_total / 1e6 / layers, event.count) for event in profile.key_averages()}
    for name in (*PRODUCTS, *BESIDE, *OTHERS):
        if name in taken:
            print(f"  {name:30} {1e6 * taken[name][0]:9.1f} us a layer, {taken[name][1] / layers:.1f} launches")
    beside, products = (sum(taken.get(name, (0.0,))[0] for name in names) for names in (BESIDE, PRODUCTS))
    if products:
        told_share("in a step", beside + z_of_down * ("gate_thin_kernel" in taken), products)


def step_seconds(
    fields: dict, layers: int, options, device: torch.device, dtype: torch.dtype, z_of_down: float
) -> tuple[float, float]:
    """Return (seconds of a training step of so many layers, GiB held at most). z_of_down: for `of_profile`."""
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
    if (options.profile or options.share) and device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        if options.profile:
            print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70))
        of_profile(profile, layers, z_of_down)
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
    parser.add_argument("--share", action="store_true", help="print what kernels of experts take in one step")
    parser.add_argument("--cuda_graphs", type=lambda word: {"true": True, "false": False}[word])
    add_machine(parser)
    options = parser.parse_args()
    device, dtype = machine(options)
    fields = QWEN3_30B_A3B if options.model is None else json.loads(options.model.read_text())
    tokens = options.rows * options.seq_length
    print(f"{where_of(device)}, {dtype}, {tokens} tokens, r {options.r}")
    z_of_down = kernels_alone(fields, tokens, options.r, device, dtype)
    few, many = options.layers
    (short, _), (long, held) = (step_seconds(fields, n, options, device, dtype, z_of_down) for n in (few, many))
    each = (long - short) / (many - few)
    whole = short + (fields["num_hidden_layers"] - few) * each
    steps = f"steps of {few} and {many} layers {1e3 * short:.1f} and {1e3 * long:.1f} ms"
    print(f"  a layer {1e3 * each:.2f} ms; {steps}, {held:.1f} GiB")
    print(f"  {fields['num_hidden_layers']} layers: {whole:.3f} s a step, {tokens / whole:.0f} tokens a second")


if __name__ == "__main__":
    main()
