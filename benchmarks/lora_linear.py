"""One linear with a LoRA branch, forward and backward: what the branch costs above the frozen linear.

    OMP_NUM_THREADS=2 python benchmarks/lora_linear.py                 # CPU, float32
    python benchmarks/lora_linear.py --device cuda                     # GPU, bfloat16

Each contender makes y, dx, dA and dB of the same x, W, A, B and dy. They run in turn, in one process; the table has
medians, the time above the frozen linear that runs on the same GEMM library, and that as a share of eager torch's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megalora.lora import Adapter
from megalora.parallel.linear import ColumnParallelLinear, LinearGroup, Placement, Tokens
from megalora.parallel.mesh import Axis
from megalora.parallel.split import even_part


@dataclass(frozen=True)
class Shape:
    """x [tokens, in_features], W [out_features, in_features], rank r, dropout p."""

    tokens: int
    in_features: int
    out_features: int
    r: int
    p: float

    def __str__(self) -> str:
        return f"{self.tokens} x {self.in_features} x {self.out_features}, r {self.r}, p {self.p:g}"


SHAPES = {
    "cpu": [Shape(1024, 576, 576, 8, 0.1), Shape(1024, 576, 1536, 8, 0.1)],
}
SCALING = 2.0


class Case:
    """The tensors of a shape, the same for every contender."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)

        def randn(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        self.shape, self.device, self.dtype = shape, device, dtype
        self.x = randn(shape.tokens, shape.in_features)
        self.W = randn(shape.out_features, shape.in_features) * shape.in_features**-0.5
        self.A, self.B = randn(shape.r, shape.in_features), randn(shape.out_features, shape.r)
        self.dy = randn(shape.tokens, shape.out_features)


Step = Callable[[], None]


def megalora_linear(case: Case, r: int) -> Step:
    """Our linear as a layer has it: x stands in rows that leave room for z, and so does its gradient."""
    shape, place = case.shape, Placement(Axis(), False, case.dtype, case.device)
    linear = ColumnParallelLinear(
        "linear",
        shape.in_features,
        shape.out_features,
        even_part(shape.out_features, place.tp),
        bias=False,
        adapter=Adapter(r, SCALING, shape.p) if r else None,
        trains_bias=False,
        place=place,
    )
    group = LinearGroup((linear,), 0, place)
    linear.weight.data.copy_(case.W)
    if r:
        linear.lora_A.weight.data.copy_(case.A)
        linear.lora_B.weight.data.copy_(case.B)
    group.refresh()
    X = torch.nn.functional.pad(case.x, (0, group.room)).requires_grad_()
    index = torch.arange(shape.tokens, device=case.device)
    tokens = Tokens(index, index, seed=0, step=0)
    trained = [X, linear.lora_A.weight, linear.lora_B.weight] if r else [X]

    def step() -> None:
        torch.autograd.grad(group(X, tokens), trained, case.dy)

    return step


def frozen(case: Case) -> Step:
    x = case.x.clone().requires_grad_()

    def step() -> None:
        torch.autograd.grad(torch.nn.functional.linear(x, case.W), x, case.dy)

    return step


def eager(case: Case) -> Step:
    """As peft writes it: result + lora_B(lora_A(dropout(x))) * scaling."""
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
    dropout = torch.nn.Dropout(case.shape.p)
    linear = torch.nn.functional.linear

    def step() -> None:
        y = linear(x, case.W) + linear(linear(dropout(x), A), B) * SCALING
        torch.autograd.grad(y, (x, A, B), case.dy)

    return step


FROZEN, EAGER = "frozen linear, torch", "eager, nn.Dropout"
FROZEN_OURS, OURS = "frozen linear, megalora", "megalora"
CONTENDERS: dict[str, Callable[[Case], Step]] = {
    FROZEN: frozen,
    EAGER: eager,
    FROZEN_OURS: lambda case: megalora_linear(case, 0),
    OURS: lambda case: megalora_linear(case, case.shape.r),
}
# The frozen linear that runs on the same GEMM library; the torch one where nothing is said.
BASES = {FROZEN_OURS: FROZEN_OURS, OURS: FROZEN_OURS}


def measure(case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each contender, in turn."""
    steps = {name: build(case) for name, build in CONTENDERS.items()}
    synchronize = torch.cuda.synchronize if case.device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 3):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if i >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    records = []
    for shape in SHAPES[device.type]:
        seconds = measure(Case(shape, device, dtype), options.repeats)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        above = {name: medians[name] - medians[BASES.get(name, FROZEN)] for name in medians}
        print(shape)
        for name, median in medians.items():
            base = medians[BASES.get(name, FROZEN)]
            print(
                f"  {name:28s} {median * 1e3:8.3f} ms, {median / base:5.2f} of its frozen linear, "
                f"{above[name] * 1e3:7.3f} ms above it, {above[name] / above[EAGER]:5.2f} of eager's"
            )
        records.append({"shape": asdict(shape), "medians": medians, "above": above, "seconds": seconds})
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, {dtype}, torch {torch.__version__}")
    if options.output:
        options.output.write_text(json.dumps({"where": where, "dtype": str(dtype), "records": records}, indent=1))


if __name__ == "__main__":
    main()
