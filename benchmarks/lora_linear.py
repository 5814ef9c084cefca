"""One linear with a LoRA branch, forward and backward: what the branch costs above the frozen linear.

    OMP_NUM_THREADS=2 python benchmarks/lora_linear.py                 # CPU, float32
    python benchmarks/lora_linear.py --device cuda                     # GPU, bfloat16

Each contender makes y, dx, dA and dB of the same x, W, A, B and dy. They run in turn, in one process; the table has
medians, the time above the frozen linear that runs on the same GEMM library, and that as a share of eager torch's. On a
GPU each is captured as a CUDA graph first, so that no launch is waited for; below the table stand the errors against
float64, beside those of eager torch on the same inputs with the same mask, and whether 20 repeats of ours are equal to
the bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from common import add_machine, machine, record, where_of

from megalora.adapters.lora import Adapter
from megalora.ops.dropout import Dropout, keep_mask
from megalora.parallel.group import LinearGroup
from megalora.parallel.group_grad import apply_group
from megalora.parallel.linear import ColumnParallelLinear
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement, Tokens
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
    # The linears of an 8B Llama, four rows of 2048 tokens.
    "cuda": [
        Shape(8192, 4096, 4096, 16, 0.1),
        Shape(8192, 4096, 1024, 16, 0.1),
        Shape(8192, 4096, 14336, 16, 0.1),
        Shape(8192, 14336, 4096, 16, 0.1),
        Shape(8192, 4096, 4096, 64, 0.05),
        Shape(8192, 4096, 1024, 64, 0.05),
        Shape(8192, 4096, 4096, 16, 0.0),
    ],
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


Step = Callable[[], object]


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
    factors = [linear.lora_A.weight, linear.lora_B.weight] if r else []
    for factor in factors:
        factor.grad = torch.zeros_like(factor)  # as a run has it: gradients are added to what is there

    def step() -> tuple[torch.Tensor, ...]:
        y = apply_group(group, X, tokens)
        (dX,) = torch.autograd.grad(y, X, case.dy)
        return y.detach(), dX[:, : shape.in_features], *(factor.grad for factor in factors)

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


def compiled(case: Case) -> Step:
    """torch.compile of eager."""
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
    linear, p = torch.nn.functional.linear, case.shape.p

    @torch.compile
    def forward(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        dropped = torch.nn.functional.dropout(x, p)
        return linear(x, case.W) + linear(linear(dropped, A), B) * SCALING

    def step() -> None:
        torch.autograd.grad(forward(x, A, B), (x, A, B), case.dy)

    return step


class _InPlace(torch.autograd.Function):
    """GEMMs that add into the result, as unsloth orders them; it has no dropout."""

    @staticmethod
    def forward(ctx, x, W, A, B):
        ctx.save_for_backward(x, W, A, B)
        return (x @ W.t()).addmm_(x @ A.t(), B.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        dz = dy @ B
        dB = (dy.t() @ (x @ A.t())).mul_(SCALING)
        return (dy @ W).addmm_(dz, A, alpha=SCALING), None, (dz.t() @ x).mul_(SCALING), dB


def in_place(case: Case) -> Step:
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))

    def step() -> None:
        torch.autograd.grad(_InPlace.apply(x, case.W, A, B), (x, A, B), case.dy)

    return step


FROZEN, EAGER = "frozen linear, torch", "eager, nn.Dropout"
FROZEN_OURS, OURS = "frozen linear, megalora", "megalora"
CONTENDERS: dict[str, Callable[[Case], Step]] = {
    FROZEN: frozen,
    EAGER: eager,
    FROZEN_OURS: lambda case: megalora_linear(case, 0),
    OURS: lambda case: megalora_linear(case, case.shape.r),
}
ON_A_GPU: dict[str, Callable[[Case], Step]] = {
    "torch.compile": compiled,
    "unsloth's order, no dropout": in_place,
}
# The frozen linear that runs on the same GEMM library; the torch one where nothing is said.
BASES = {FROZEN_OURS: FROZEN_OURS, OURS: FROZEN_OURS}


def measure(case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each contender, in turn."""
    on_gpu = case.device.type == "cuda"
    contenders = CONTENDERS | ON_A_GPU if on_gpu else CONTENDERS
    steps = {name: build(case) for name, build in contenders.items()}
    if on_gpu:
        steps = {name: captured(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 3):
        for name, step in steps.items():
            elapsed = seconds_on_gpu(step) if on_gpu else seconds_on_cpu(step)
            if i >= 3:
                seconds[name].append(elapsed)
    return seconds


def seconds_on_cpu(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def seconds_on_gpu(step: Step, times: int = 4) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def errors(case: Case) -> dict[str, tuple[float, float]]:
    """Relative errors against float64 of y, dx, dA, dB: (ours, eager torch with the mask of ours)."""
    shape, index = case.shape, torch.arange(case.shape.tokens, device=case.device)
    mask = torch.ones_like(case.x)
    if shape.p:
        draw = Dropout(shape.p, seed=0, site=0, step=0)
        mask = keep_mask(index, shape.in_features, draw).to(case.dtype) * draw.scale

    def outputs(dtype: torch.dtype) -> list[torch.Tensor]:
        x, W, A, B, dy = (t.to(dtype) for t in (case.x, case.W, case.A, case.B, case.dy))
        leaves = [t.requires_grad_() for t in (x.clone(), A.clone(), B.clone())]
        x, A, B = leaves
        linear = torch.nn.functional.linear
        exact_mask = mask.to(dtype) if dtype != torch.float64 or not shape.p else (mask != 0) * draw.scale
        y = linear(x, W) + linear(linear(x * exact_mask, A), B) * SCALING
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    exact, theirs, ours = outputs(torch.float64), outputs(case.dtype), megalora_linear(case, shape.r)()

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found.double() - wanted).norm() / wanted.norm())

    return {
        name: (error(ours[i], exact[i]), error(theirs[i], exact[i])) for i, name in enumerate(("y", "dx", "dA", "dB"))
    }


def repeats_are_equal(case: Case, times: int = 20) -> bool:
    """Whether ours gives the same bits each time, from fresh gradients."""
    first = None
    for _ in range(times):
        found = [t.clone() for t in megalora_linear(case, case.shape.r)()]
        first = found if first is None else first
        if not all(torch.equal(a, b) for a, b in zip(first, found, strict=True)):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_machine(parser)
    parser.add_argument("--repeats", type=int, default=101)
    options = parser.parse_args()
    device, dtype = machine(options)
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
        measured = {"shape": asdict(shape), "medians": medians, "above": above, "seconds": seconds}
        if device.type == "cuda":
            case = Case(shape, device, dtype)
            found, equal = errors(case), repeats_are_equal(case)
            texts = [f"{n} {a:.2e} ({a / b:.2f} of eager's)" for n, (a, b) in found.items()]
            print(f"  error against float64: {', '.join(texts)}; 20 repeats {'equal' if equal else 'DIFFER'}")
            measured |= {"errors": found, "repeats_equal": equal}
        records.append(measured)
    where = where_of(device)
    print(f"{where}, {dtype}, torch {torch.__version__}")
    if options.output:
        rows = [
            (str(Shape(**each["shape"])), name, f"{median * 1e3:.3f}", f"{each['above'][name] * 1e3:.3f}")
            for each in records
            for name, median in each["medians"].items()
        ]
        columns = ("shape", "contender", "ms", "above its frozen linear")
        record(options.output, "One linear with its branch", f"{dtype}.", where, columns, rows, records)


if __name__ == "__main__":
    main()
