"""The CUDA kernels of a LoRA branch by themselves: microseconds and bytes a second, replayed from CUDA graphs.

    python benchmarks/lora_kernels.py

8192 and 2048 tokens, dropout 0.1, bfloat16: of 4096 features z, the masked term of dx, dA, and the last two in one; of
14336 features the SwiGLU's forward pass with z, as two kernels and as one, and its backward pass with dA and both dB.
Inputs rotate, so that none is found in the cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from megalora.ops import extension, lora_backward, swiglu
from megalora.ops.dropout import Dropout
from megalora.ops.lora_linear import lora_down_, lora_down_input_grad_, room_for

DRAW = Dropout(0.1, seed=1, site=2, step=3)
FEATURES, INNER, RANK, SCALING = 4096, 14336, 16, 2.0


def microseconds(work: Callable, inputs: Sequence[tuple], repeats: int = 10) -> float:
    """Of `work` on one of `inputs`: the median of replays over all of them."""
    for one in inputs:
        work(*one)
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for one in inputs:
            work(*one)
    graph.replay()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(inputs))
    return statistics.median(times)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def branch(tokens: int, rank: int) -> None:
    index, room = torch.arange(tokens, device="cuda"), room_for(rank, "cuda")
    size, wide = FEATURES, FEATURES + room
    inputs = [
        (randn(tokens, wide), randn(tokens, wide), randn(rank, size), torch.zeros(rank, size, device="cuda"))
        for _ in range(4)
    ]
    x_bytes = 2 * tokens * size

    def dz(dX: torch.Tensor) -> torch.Tensor:
        return dX[:, size : size + rank]

    works = {
        "z": (1, lambda X, dX, A, dA: lora_down_(X, A, index, DRAW)),
        "masked dx": (2, lambda X, dX, A, dA: lora_down_input_grad_(dX[:, :size], dz(dX), A, index, DRAW)),
        "dA": (1, lambda X, dX, A, dA: lora_backward.add_down_weight_grad_([dA], dz(dX), X[:, :size], index, DRAW)),
        "both": (
            3,
            lambda X, dX, A, dA: lora_backward.lora_backward_(dX[:, :size], dz(dX), X[:, :size], A, index, DRAW, [dA]),
        ),
    }
    for name, (passes, work) in works.items():
        took = microseconds(work, inputs)
        print(f"{tokens} x {size}, r {rank:3d}, {name:9s} {took:7.1f} us, {passes * x_bytes / took / 1e6:.2f} TB/s")


def gated(tokens: int, act: str) -> None:
    index, size = torch.arange(tokens, device="cuda"), INNER
    inputs = []
    for _ in range(2):
        z, dB = randn(tokens, 64), [torch.zeros(size, RANK, device="cuda") for _ in range(2)]
        ups = [
            lora_backward.UpBranch(slice(i * size, (i + 1) * size), z[:, i * RANK : (i + 1) * RANK], SCALING, dB[i])
            for i in range(2)
        ]
        dX, A = randn(tokens, size + 64), randn(RANK, size)
        inputs.append((randn(tokens, 2 * size), dX, A, torch.zeros(RANK, size, device="cuda"), ups))

    def forward_apart(gate_up, dX, A, dA, ups):
        lora_down_(swiglu.swiglu(gate_up, 64, act), A, index, DRAW)

    def forward(gate_up, dX, A, dA, ups):
        swiglu.swiglu_down(gate_up, 64, A, index, DRAW, act)

    def backward(gate_up, dX, A, dA, ups):
        dz = dX[:, size : size + RANK]
        lora_backward.swiglu_lora_backward_(dX[:, :size], gate_up, dz, A, index, DRAW, dA, ups, act)

    for name, passes, work in (("x, then z", 4, forward_apart), ("in one", 3, forward), ("backward", 5, backward)):
        took = microseconds(work, inputs)
        rate = passes * 2 * tokens * size / took / 1e6
        print(f"{tokens} x {size}, r {RANK:3d}, {act} {name:9s} {took:7.1f} us, {rate:.2f} TB/s")


def main() -> None:
    if not extension.has_kernels("cuda"):
        raise SystemExit("there is no GPU here, or megalora's CUDA kernels are not built: make install")
    for tokens in (8192, 2048):
        for rank in (16, 48, 64, 128):
            branch(tokens, rank)
        for act in swiglu.ACTS:
            gated(tokens, act)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
